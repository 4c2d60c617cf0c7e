"""Eight bits in ONNX Runtime's own format (.ort), for apps on phones."""

from dataclasses import replace
from pathlib import Path

from edgeprune_export.ort_format import MAX_BYTES, SPARE_BYTES, convert_to_ort, mobile_findings
from edgeprune_runtime.bundle import Manifest

PROVIDER = "cpu"
PRECISIONS = ("int8",)
MAX_DATA_BYTES = MAX_BYTES - SPARE_BYTES
ORT_FOLDER, RESULTS = "ort", "mobile"
NOTES = (
    f"the app takes {ORT_FOLDER}/*.ort, weights included, and tokenizer.json; onnx/ is for checking on a workstation, "
    f"where `edgeprune run BUNDLE/{ORT_FOLDER}/NAME.ort` runs such a file as well",
    f"a build of ONNX Runtime for this app alone takes {ORT_FOLDER}/*.required_operators.config "
    "(--include_ops_by_config); the full packages need none",
)
VERIFIED = (
    "the .ort files are run by ONNX Runtime on an x86-64 processor and equal the ONNX graphs; no phone was at hand"
)


def package(folder: Path, manifest: Manifest) -> Manifest:
    """Convert every variant, and write down what ONNX Runtime's mobile usability check says of the default one."""
    converted = {}
    for name, variant in manifest.variants.items():
        files = convert_to_ort(folder / variant.graph, folder / ORT_FOLDER)
        converted[name] = {"size_bytes": files.size_bytes, "max_abs_error": files.max_abs_error}
    findings = mobile_findings(folder / manifest.variants[manifest.default_variant].graph)
    return replace(
        manifest,
        results={**manifest.results, RESULTS: {"ort": converted, "usability": findings.to_dict()}},
        notes=(*manifest.notes, *findings.sentences()),
    )
