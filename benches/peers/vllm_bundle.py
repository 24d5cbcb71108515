"""vLLM for a GPU machine without network that has PyTorch: what it lacks, as one archive in parts.

    python3 vllm_bundle.py --present packages.txt --out bundle          # there: python3 -m pip list --format freeze
    cat bundle/vllm.tar.xz.* | tar xJ && PYTHONPATH=vllm python3 vllm_bench.py ...

The wheels of vLLM and of what it requires are unpacked side by side, without those that the machine has, and without what
a Llama in bf16 does not need: other libraries of kernels, and in vLLM's wheel FlashAttention 2 and DeepGEMM.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile

VLLM = "vllm==0.20.2"
# Kernels and tools of other models, hardware and servers; vLLM asks for them when it uses them.
LEFT_OUT = """
    fastsafetensors flashinfer-cubin flashinfer-python nvidia-cudnn-frontend nvidia-cutlass-dsl opencv-python-headless
    quack-kernels supervisor tilelang torch torchaudio torchvision triton
""".split()
UNUSED = ["vllm/vllm_flash_attn/_vllm_fa2_C.*", "vllm/third_party/deep_gemm", "vllm/_deep_gemm*"]
# Wheels name the oldest system that they run on, and pip asks for each by name.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
PART_BYTES = "39M"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--present", required=True, help="what the machine has, as `pip list --format freeze` says")
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--out", default="bundle")
    return parser.parse_args()


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(out, python):
    """Name and address of each wheel that pip would install on the machine: versions that go together."""
    report = out / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--only-binary", ":all:", "--python-version", python, "--target", str(out / "none")]
    command += [option for platform in PLATFORMS for option in ("--platform", platform)]
    subprocess.run([*command, "--report", str(report), VLLM], check=True)
    with open(report) as file:
        chosen = json.load(file)["install"]
    return [(wheel["metadata"]["name"], wheel["download_info"]["url"]) for wheel in chosen]


def collect(present, out, wheels, python):
    """Downloads vLLM and all that it requires and the machine lacks."""
    for name, url in resolve(out, python):
        if canonical(name) in present | set(LEFT_OUT):
            continue
        wheel = wheels / url.split("/")[-1].split("#")[0]
        urllib.request.urlretrieve(url, wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)


def main():
    args = parse()
    out = pathlib.Path(args.out)
    wheels, packages = out / "wheels", out / "vllm"
    shutil.rmtree(out, ignore_errors=True)
    wheels.mkdir(parents=True)
    with open(args.present) as file:
        present = {canonical(line.split("==")[0].split(" @ ")[0].strip()) for line in file if line.strip()}
    collect(present, out, wheels, args.python)
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
