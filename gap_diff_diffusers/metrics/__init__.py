"""What a person sees when someone tries: is there a face in the generated pictures, and whose?"""
