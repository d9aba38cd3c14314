"""Words and numbers that several rooms share: parts of a data set, formats of files, sizes of images."""

from __future__ import annotations

SPLITS = ("test", "val", "train")
"""The parts of a data set, in the order in which they are offered and looked for."""

WEIGHT_FORMATS, GRAPH_FORMATS = ("pt", "safetensors"), ("onnx", "pt2")
RUNTIME_FORMATS = ("torchscript", "openvino", "ncnn", "tflite", "coreml")
FOLDER_FORMATS = ("timm", *RUNTIME_FORMATS)
FORMATS = (*WEIGHT_FORMATS, *GRAPH_FORMATS, *FOLDER_FORMATS)
"""The formats that repan writes: weights, graphs that run without it, and folders for other programs."""

GRAPH_ENDINGS = (".onnx", ".pt2")
WEIGHT_ENDINGS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
"""Endings of files of weights, repan's and others'."""

ARTIFACT_ENDINGS = (*WEIGHT_ENDINGS, *GRAPH_ENDINGS)
"""Endings of all files that hold a network."""

DATASET_PREFIXES = ("hfds", "torch", "wds", "tfds", "hfids")
"""Words before the slash in the names of data sets that timm opens."""

SMALL_IMAGE = 64
"""Up to this side in pixels images live in memory, and short names of networks mean ours."""

CROP_SHARE = 0.875
"""Side of the part that is looked at, of a resized image, where a network does not say otherwise."""

CENTER, SQUASH, BORDER = "center", "squash", "border"
CROP_MODES = (CENTER, SQUASH, BORDER)
"""The ways in which large images become square, as in timm: resize the shorter side and crop the middle; resize both
sides; resize the longer side and pad."""

INTERPOLATION = "bicubic"
INTERPOLATIONS = (INTERPOLATION, "bilinear", "nearest", "box", "hamming", "lanczos")
"""Pillow's filters, the usual one first."""

LARGE_IMAGE = 224
"""Side in pixels that networks and data sets for ImageNet are made for."""

SAME_RESULT = frozenset(
    {
        *("data.root", "data.workers", "run.device", "run.graph", "run.log_every", "run.max_hours", "run.save_every"),
        "run.trackers",
    }
)
"""Settings that do not change the result of a run: a resumed run or study may change them."""


OPSET = 18
"""The version that torch.onnx writes, and the default of files."""

OPSETS = range(11, 22)
"""The versions that are offered, each tried in ONNX Runtime by a test."""

INT8_OPSETS = range(13, OPSETS.stop)
"""The versions of these that have a scale for each channel."""

INT8_TARGETS = ("ort", "tensorrt", "openvino")
"""The programs that int8 files are made for: ONNX Runtime, TensorRT, OpenVINO."""


def is_resized(crop: str, size: int) -> bool:
    """Return whether images of this side are resized and a part of them taken, given the setting `data.crop`.

    Others are cropped to a square and resized to their side at once.
    """
    return crop == "resized" or (crop == "auto" and size > SMALL_IMAGE)


CONFIG_FILE, ARM_FILE = "config.yaml", "arm.yaml"
"""The file of the settings of a run, and that of a study's arm beside its runs: `repan COMMAND -c` reads both."""

BESIDE_CONFIG = ("status.json", "env.json", "summary.json")
"""The files of a run, one of which at least lies beside its settings."""

PLACES = "places"
"""The key, in what is noted beside a run's settings, of the absolute paths of those that are relative."""

DATA_ROOT, PLACE_OF_DATA = "data.root", "data_root"
"""The setting of the folder of the data, and the key of its absolute path in files that have no other places."""
