"""Methods of the literature that protect photos by optimizing a perturbation for each."""
