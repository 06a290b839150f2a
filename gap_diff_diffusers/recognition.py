"""Faces found in pictures and told apart: one interface over dlib, OpenCV's networks and InsightFace's.

dlib is the default: offline, on the CPU. Figures of different backends are not comparable.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from .data import to_pixels, to_tensor
from .download import cache_folder, fetch_file
from .faces import import_dlib
from .images import resize_pixels

logger = logging.getLogger(__name__)

LARGEST_SIDE = 1024


class FaceRecognizer(ABC):
    """Finds faces and says by numbers whose they are.

    Attributes:
        name: of the backend, in results.
        threshold: faces at a smaller `distance` are the same person's.
    """

    name: ClassVar[str]
    threshold: ClassVar[float]

    @abstractmethod
    def embeddings(self, image: torch.Tensor) -> list[np.ndarray]:
        """The faces in an image (3,H,W) in [0,1], the largest first: one array (E,) each."""

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """How unlike two faces are, as the backend measures it: unless it says otherwise, 1 less their cosine."""
        return 1 - cosine(first, second)

    def largest_faces(self, photos: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """The largest face of each photo (3,H,W) in [0,1] that has one."""
        return [faces[0] for photo in photos if (faces := self.embeddings(photo))]

    def reference(self, photos: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """The largest face of each photo (3,H,W) in [0,1] that has one; ValueError if none has.

        It warns if the faces fall into groups that are not alike: these may be several people.
        """
        known = self.largest_faces(photos)
        if not known:
            raise ValueError(f"expected a face in the reference, found none in {len(photos)} photos")
        if (people := self.count_people(known)) > 1:
            logger.warning("the faces of %d photos may be of %d people", len(known), people)
        return known

    def compare(
        self, images: Sequence[torch.Tensor], known: Sequence[np.ndarray]
    ) -> tuple[list[float | None], list[float | None]]:
        """How near the largest face of each image (3,H,W) in [0,1] is to the person of `reference`.

        Returns:
            Distances from the nearest of the known faces, and cosines with their mean; None for images without a face.

        Raises:
            ValueError: no images.
        """
        if not len(images):
            raise ValueError("expected pictures to compare, got none")
        distances: list[float | None] = []
        cosines: list[float | None] = []
        mean = np.mean(known, axis=0)
        for image in images:
            face = next(iter(self.embeddings(image)), None)
            distances.append(None if face is None else min(self.distance(face, other) for other in known))
            cosines.append(None if face is None else cosine(face, mean))
        return distances, cosines

    def count_people(self, faces: Sequence[np.ndarray]) -> int:
        """How many groups there are, if faces under the threshold belong together, and those between them, too."""
        left, groups = list(range(len(faces))), 0
        while left:
            reached = [left.pop()]
            groups += 1
            while reached:
                face = faces[reached.pop()]
                near = [other for other in left if self.distance(face, faces[other]) < self.threshold]
                left = [other for other in left if other not in near]
                reached += near
        return groups


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of the angle between two arrays (E,)."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


class DlibFaces(FaceRecognizer):
    """dlib's frontal face detector, its five landmarks and its embedding of 128 numbers.

    The threshold is the one that its network was made for (http://dlib.net/face_recognition.py.html). The models are
    in the package `face_recognition_models`; they are read by path, for importing that needs a long-gone setuptools.

    Args:
        models: the folder of the two `.dat` files; None for that of `face_recognition_models`.

    Raises:
        ImportError: dlib or the models are not installed.
    """

    name = "dlib"
    threshold = 0.6

    def __init__(self, models: Path | None = None):
        self._dlib = import_dlib()
        if models is None:
            found = importlib.util.find_spec("face_recognition_models")
            if found is None or found.origin is None:
                raise ImportError(
                    "expected the package face_recognition_models with dlib's weights, got none; "
                    "pip install 'gap_diff_diffusers[metrics]'"
                )
            models = Path(found.origin).parent / "models"
        self._detect = self._dlib.get_frontal_face_detector()
        self._landmarks = self._dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self._network = self._dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def embeddings(self, image: torch.Tensor) -> list[np.ndarray]:
        return self.embed(self.locate(image))

    def align(self, image: torch.Tensor, size: int) -> list[torch.Tensor]:
        """The faces that `embeddings` finds, the largest first, upright, at one size: (3,size,size) in [0,1]."""
        return self.cut(self.locate(image), size)

    def locate(self, image: torch.Tensor, *, upsample: int = 1) -> tuple[np.ndarray, list]:
        """The pixels that were searched, and dlib's landmarks of the faces there, the largest first.

        An image (3,H,W) in [0,1] bigger than `LARGEST_SIDE` is scaled down to that. Then faces are looked for after
        scaling it by two as often as `upsample` says: once, for faces from 40 px on, those of pictures of 256 px among
        them.
        """
        pixels = to_pixels(image)
        if (scale := LARGEST_SIDE / max(pixels.shape[:2])) < 1:
            pixels = resize_pixels(pixels, *(round(side * scale) for side in pixels.shape[:2]))
        boxes = sorted(self._detect(pixels, upsample), key=lambda box: -box.area())
        return pixels, [self._landmarks(pixels, box) for box in boxes]

    def embed(self, located: tuple[np.ndarray, list]) -> list[np.ndarray]:
        """What `locate` found: one array (128,) a face."""
        pixels, faces = located
        return [np.array(self._network.compute_face_descriptor(pixels, face)) for face in faces]

    def cut(self, located: tuple[np.ndarray, list], size: int, margin: int = 0) -> list[torch.Tensor]:
        """What `locate` found, upright, `margin` pixels more on every side: (3,S,S), S being size + 2 margin."""
        pixels, faces = located
        whole = size + 2 * margin
        padding = (1.5 * whole / size - 1) / 2  # dlib's own is 0.25 of the face on every side
        chips = [self._dlib.get_face_chip(pixels, face, size=whole, padding=padding) for face in faces]
        return [to_tensor(Image.fromarray(chip)) for chip in chips]

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        return float(np.linalg.norm(first - second))


YUNET_SIDE = 320
OPENCV_ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/{commit}/models/{file}"
OPENCV_ZOO_COMMIT = "779ffc85a86986d8e23d1d442e316d07825f230e"
YUNET = "face_detection_yunet/face_detection_yunet_2023mar.onnx"
SFACE = "face_recognition_sface/face_recognition_sface_2021dec.onnx"
OPENCV_MODELS = {  # file: sha256
    YUNET: "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    SFACE: "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
}


class OpenCVFaces(FaceRecognizer):
    """YuNet finds faces, SFace embeds them in 128 numbers: networks of OpenCV Zoo (MIT and Apache-2.0, weights too).

    The threshold is that of the zoo's demo for two photos: a cosine of 0.363.

    Args:
        models: a folder with the two `.onnx` files, by their names in the zoo; None to download them (39 MB) once.

    Raises:
        ImportError: OpenCV is not installed.
        OSError: a file is not there, or cannot be downloaded.
    """

    name = "opencv"
    threshold = 1 - 0.363

    def __init__(self, models: Path | None = None):
        try:
            import cv2
        except ImportError as error:
            raise ImportError(
                f"expected OpenCV, got none ({error}); pip install 'gap_diff_diffusers[metrics]'"
            ) from error
        yunet, sface = (_opencv_model(file, models) for file in (YUNET, SFACE))
        try:
            self._detector = cv2.FaceDetectorYN.create(str(yunet), "", (320, 320), 0.9, 0.3, 5000)
            self._network = cv2.FaceRecognizerSF.create(str(sface), "")
        except cv2.error as error:
            raise OSError(f"expected networks of OpenCV Zoo in {yunet} and {sface}, got other files") from error

    def embeddings(self, image: torch.Tensor) -> list[np.ndarray]:
        """The faces in an image (3,H,W) in [0,1], the largest first: one array (128,) each.

        YuNet knows faces of about 10 to 300 px. So they are looked for with the image scaled to a long side of
        `YUNET_SIDE`, and cut out of the image as it is.
        """
        pixels = np.ascontiguousarray(to_pixels(image)[:, :, ::-1])  # OpenCV's order is BGR
        scale = YUNET_SIDE / max(pixels.shape[:2])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        self._detector.setInputSize((width, height))
        _, found = self._detector.detect(np.ascontiguousarray(resize_pixels(pixels, height, width)))
        faces = [np.append(face[:14] / scale, face[14:]) for face in (found if found is not None else [])]
        faces = sorted((face.astype(np.float32) for face in faces), key=lambda face: -face[2] * face[3])
        return [self._network.feature(self._network.alignCrop(pixels, face)).ravel().copy() for face in faces]


class InsightFaces(FaceRecognizer):
    """RetinaFace's successor SCRFD finds faces, ArcFace embeds them in 512 numbers: InsightFace's model pack by ONNX.

    The nearest to the paper's RetinaFace and ArcFace; but SCRFD takes a face for one from a score of 0.5 on, as
    InsightFace has it, and upstream's RetinaFace from 0.9. The library is MIT; **its pretrained models are for
    non-commercial research only**, and it downloads them when it is first asked. The threshold is that of its own
    verification of two photos: a cosine of 0.4.

    Args:
        models: a folder with a pack's `.onnx` files, or a pack's name.

    Raises:
        ImportError: insightface is not installed.
        OSError: the models are not there and cannot be downloaded.
    """

    name = "insightface"
    threshold = 1 - 0.4

    def __init__(self, models: str | Path = "buffalo_l"):
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise ImportError(
                f"expected insightface, got none ({error}); pip install 'gap_diff_diffusers[arcface]'"
            ) from error
        if isinstance(models, Path) and not models.is_dir():
            raise OSError(f"expected a folder with a model pack of insightface, found none at {models}")
        logger.warning("InsightFace's pretrained models are for non-commercial research only")
        remedy = f"expected a model pack of insightface, got {models}; if its download broke off, delete it"
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it downloads
                self._analysis = FaceAnalysis(
                    str(models), allowed_modules=["detection", "recognition"], providers=["CPUExecutionProvider"]
                )
        # Of a pack without a detector, a failed download, a broken archive, files that are no networks.
        except (AssertionError, RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise OSError(f"{remedy} ({error})") from error
        if "recognition" not in self._analysis.models:
            raise OSError(f"{remedy} (it has no network that embeds faces)")
        self._analysis.prepare(ctx_id=-1, det_thresh=0.5)  # at insightface's own two sizes

    def embeddings(self, image: torch.Tensor) -> list[np.ndarray]:
        faces = self._analysis.get(np.ascontiguousarray(to_pixels(image)[:, :, ::-1]))
        areas = [(face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]) for face in faces]
        return [faces[i].embedding for i in sorted(range(len(faces)), key=lambda i: -areas[i])]


def _opencv_model(file: str, folder: Path | None) -> Path:
    """Where a model of the zoo is; it is downloaded if no folder is given, and checked."""
    if folder is None:
        address = OPENCV_ZOO.format(commit=OPENCV_ZOO_COMMIT, file=file)
        path = cache_folder("opencv-zoo") / file
        return fetch_file(address, path, OPENCV_MODELS[file], instead=f"put it at {path} by other means")
    path = Path(folder) / Path(file).name
    if not path.is_file():
        raise OSError(f"expected {path.name} in {folder}, found none; leave the folder out to download it")
    return path
