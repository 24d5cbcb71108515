"""vLLM for a GPU machine without network that has PyTorch: what it lacks, as one archive in parts.

    python3 vllm_bundle.py --present packages.txt --out bundle          # there: python3 -m pip list --format freeze
    cat bundle/vllm.tar.xz.* | tar xJ && PYTHONPATH=vllm python3 vllm_bench.py ...

The wheels of vLLM and of what it requires are unpacked side by side, without those that the machine has, and without what
a Llama in bf16 does not need: other libraries of kernels, and in vLLM's wheel FlashAttention 2 and DeepGEMM.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

VLLM = "vllm==0.20.2"
# Kernels and tools of other models, hardware and servers; vLLM asks for them when it uses them.
LEFT_OUT = """
    fastsafetensors flashinfer-cubin flashinfer-python nvidia-cudnn-frontend nvidia-cutlass-dsl opencv-python-headless
    quack-kernels supervisor tilelang torch torchaudio torchvision triton
""".split()
UNUSED = ["vllm/vllm_flash_attn/_vllm_fa2_C.*", "vllm/third_party/deep_gemm", "vllm/_deep_gemm*"]
PLATFORMS = ["manylinux_2_35_x86_64", "manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
PART_BYTES = "45M"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--present", required=True, help="what the machine has, as `pip list --format freeze` says")
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--out", default="bundle")
    return parser.parse_args()


def download(requirement, wheels, python):
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    before = set(wheels.iterdir())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, *platforms, "--dest", str(wheels), requirement]
    subprocess.run(command, check=True)
    return (set(wheels.iterdir()) - before).pop()


def requirements(wheel, python, extras):
    """What a wheel requires on the machine."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for text in fields.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**machine, "extra": extra}) for extra in ["", *extras]):
            yield requirement


def collect(present, wheels, python):
    """Downloads vLLM and all that it requires and the machine lacks."""
    seen = present | set(LEFT_OUT)
    wanted = [Requirement(VLLM)]
    while wanted:
        requirement = wanted.pop(0)
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        wheel = download(f"{requirement.name}{requirement.specifier}", wheels, python)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        wanted += requirements(wheel, python, requirement.extras)


def main():
    args = parse()
    out = pathlib.Path(args.out)
    wheels, packages = out / "wheels", out / "vllm"
    shutil.rmtree(out, ignore_errors=True)
    wheels.mkdir(parents=True)
    with open(args.present) as file:
        present = {canonicalize_name(line.split("==")[0].split(" @ ")[0].strip()) for line in file if line.strip()}
    collect(present, wheels, args.python)
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    for pattern in UNUSED:
        for path in packages.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    archive = subprocess.Popen(["tar", "-C", out, "-cf", "-", "vllm"], stdout=subprocess.PIPE)
    packed = subprocess.Popen(["xz", "-T0"], stdin=archive.stdout, stdout=subprocess.PIPE)
    split = ["split", "--numeric-suffixes", f"--bytes={PART_BYTES}", "-", str(out / "vllm.tar.xz.")]
    subprocess.run(split, stdin=packed.stdout, check=True)
    if archive.wait() != 0 or packed.wait() != 0:
        sys.exit("the packages could not be packed")
    for part in sorted(out.glob("vllm.tar.xz.*")):
        print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")


main()
