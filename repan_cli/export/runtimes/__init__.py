"""Write formats of other programs, each with that program's own converter, and run it to prove the file.

A format is a folder: the files of the program, and `repan.json`, which holds the network's classes, the preprocessing
of its images, and the SHA-256 of each file.
"""

from repan_cli.export.runtimes import coreml, ncnn_files, openvino_files, tflite, torchscript
from repan_cli.export.runtimes.folder import contents, opened
from repan_cli.export.runtimes.kinds import Conversion, Kind

KINDS: dict[str, Kind] = {
    "torchscript": torchscript.KIND,
    "openvino": openvino_files.KIND,
    "ncnn": ncnn_files.KIND,
    "tflite": tflite.KIND,
    "coreml": coreml.KIND,
}

__all__ = ["KINDS", "Conversion", "Kind", "contents", "opened"]
