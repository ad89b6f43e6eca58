"""Trained models in files that are smaller, or faster, on a named target."""

from pl_sparse.core.files import DamagedFileError
from pl_sparse.export.compressed import Compressed, load_compressed, save_compressed
from pl_sparse.export.coreml import CoreML
from pl_sparse.export.csr import CSR, load_csr, to_csr
from pl_sparse.export.executorch import ExecuTorch
from pl_sparse.export.format import Export
from pl_sparse.export.onnx import ONNX, ONNXInt8
from pl_sparse.export.openvino import OpenVINO, OpenVINOInt8
from pl_sparse.export.pretrained import HuggingFace, from_pretrained, save_pretrained
from pl_sparse.export.pt2 import TorchExport
from pl_sparse.export.semi_structured import SemiStructured, load_semi_structured, to_semi_structured
from pl_sparse.export.tensorrt import TensorRT, two_four
from pl_sparse.surgery.saved import load_shrunk, save_shrunk
from pl_sparse.surgery.shrink import Removal, shrink
from pl_sparse.surgery.vocabulary import TokenMap, shrink_vocabulary

Shrunk = Removal
"""The name of `Removal` until version 0.1, for one more release."""

__all__ = [
    "CSR",
    "ONNX",
    "Compressed",
    "CoreML",
    "DamagedFileError",
    "ExecuTorch",
    "Export",
    "HuggingFace",
    "ONNXInt8",
    "OpenVINO",
    "OpenVINOInt8",
    "Removal",
    "SemiStructured",
    "Shrunk",
    "TensorRT",
    "TokenMap",
    "TorchExport",
    "from_pretrained",
    "load_compressed",
    "load_csr",
    "load_semi_structured",
    "load_shrunk",
    "save_compressed",
    "save_pretrained",
    "save_shrunk",
    "shrink",
    "shrink_vocabulary",
    "to_csr",
    "to_semi_structured",
    "two_four",
]
