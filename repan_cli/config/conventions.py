"""Define names and numbers that several folders share: parts of a data set, formats of files, sizes of images."""

from __future__ import annotations

SPLITS = ("test", "val", "train")
"""The parts of a data set, in the order in which they are offered and searched."""

WEIGHT_FORMATS, GRAPH_FORMATS = ("pt", "safetensors"), ("onnx", "pt2")
RUNTIME_FORMATS = ("torchscript", "openvino", "ncnn", "tflite", "coreml")
FOLDER_FORMATS = ("timm", *RUNTIME_FORMATS)
FORMATS = (*WEIGHT_FORMATS, *GRAPH_FORMATS, *FOLDER_FORMATS)
"""The formats that repan writes: weights, graphs that run without it, and folders for other programs."""

GRAPH_ENDINGS = (".onnx", ".pt2")
WEIGHT_ENDINGS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
"""Endings of files of weights, of repan and of other programs."""

ARTIFACT_ENDINGS = (*WEIGHT_ENDINGS, *GRAPH_ENDINGS)
"""Endings of all files that hold a network."""

DATASET_PREFIXES = ("hfds", "torch", "wds", "tfds", "hfids")
"""Words before the slash in the names of data sets that timm opens."""

SMALL_IMAGE = 64
"""Up to this side in pixels, images are kept in memory, and short names of networks mean repan's."""

CROP_SHARE = 0.875
"""The share of a resized image's side that is kept, if a network does not say otherwise."""

CENTER, SQUASH, BORDER = "center", "squash", "border"
CROP_MODES = (CENTER, SQUASH, BORDER)
"""The ways in which large images become square, as in timm.

Resize the shorter side and crop the middle; resize both sides; or resize the longer side and pad.
"""

INTERPOLATION = "bicubic"
INTERPOLATIONS = (INTERPOLATION, "bilinear", "nearest", "box", "hamming", "lanczos")
"""Pillow's filters, the usual one first."""

LARGE_IMAGE = 224
"""The side in pixels for which networks and data sets for ImageNet are made."""

SAME_RESULT = frozenset(
    {
        *("data.root", "data.workers", "run.device", "run.graph", "run.log_every", "run.max_hours", "run.save_every"),
        "run.trackers",
    }
)
"""Settings that do not change the result of a run: a resumed run or study may change them."""


OPSET = 18
"""The opset that torch.onnx writes, and the default for files."""

OPSETS = range(11, 22)
"""The opsets that are offered; a test tries each in ONNX Runtime."""

INT8_OPSETS = range(13, OPSETS.stop)
"""Those opsets that have one scale per channel."""

INT8_TARGETS = ("ort", "tensorrt", "openvino")
"""The programs that int8 files are made for: ONNX Runtime, TensorRT, OpenVINO."""


def is_resized(crop: str, size: int) -> bool:
    """Return whether images of this side are resized and cropped, given the setting `data.crop`.

    Others are cropped to a square and resized to their side at once.
    """
    return crop == "resized" or (crop == "auto" and size > SMALL_IMAGE)


CONFIG_FILE, ARM_FILE = "config.yaml", "arm.yaml"
"""The file of the settings of a run, and that of a study's arm beside its runs: `repan COMMAND -c` reads both."""

BESIDE_CONFIG = ("status.json", "env.json", "summary.json")
"""The files of a run, one of which at least lies beside its settings."""

TEST_SET = "test_set"
"""In the summary of a run, the key of the digest by which its test images are recognized."""

PLACES = "places"
"""In the notes beside a run's settings, the key of the absolute paths of settings that are relative."""

DATA_ROOT, PLACE_OF_DATA = "data.root", "data_root"
"""The setting of the data folder, and the key of its absolute path in files that note no other places."""
