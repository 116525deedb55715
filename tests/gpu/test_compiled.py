"""The Triton kernels compile for sm_80, sm_90 and gfx942, as the library launches them: no spills, no atomics."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installed import needs_triton

from hf_efcp import LowRankMFAC, SparseMFAC

NAMES = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32", torch.float64: "*fp64"}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
STEPS = {
    "lowrank_mfac": lambda params: LowRankMFAC(params, backend="triton", scope="model"),
    "both moments": lambda params: LowRankMFAC(params, backend="triton", precondition="momentum"),
    "sparse_mfac, gradient": lambda params: SparseMFAC(params, backend="triton", precondition="gradient"),
    "sparse_mfac": lambda params: SparseMFAC(params, backend="triton"),
    "largest solved": lambda params: LowRankMFAC(params, backend="triton", num_grads=64),
    "lean": lambda params: LowRankMFAC(params, backend="triton", metric="factored"),
    "sparse, factored": lambda params: SparseMFAC(
        params, backend="triton", metric="factored", precondition="momentum", num_grads=16
    ),
    "large, lean, both moments, L2": lambda params: LowRankMFAC(
        params,
        backend="triton",
        metric="factored",
        precondition="momentum",
        num_grads=65,
        weight_decay=0.1,
        decoupled_weight_decay=False,
    ),
    "wide": lambda params: LowRankMFAC(
        params, backend="triton", error_dtype=torch.float32, metric_dtype=torch.float32, value_dtype=torch.float32
    ),
    "the paper's": lambda params: SparseMFAC(params, backend="triton", metric="none", damp=1e-3),
    "sparse_mfac 256": lambda params: SparseMFAC(
        params, backend="triton", num_grads=256, value_dtype=torch.int8, error_dtype=torch.float32
    ),
    "long blocks": lambda params: SparseMFAC(params, backend="triton", block_size=16384),
    "short blocks": lambda params: SparseMFAC(params, backend="triton", block_size=48, error_dtype=torch.float32),
}

MAY_SPILL = {"long blocks", "short blocks"}  # other sizes than the defaults


@pytest.fixture(scope="module", params=STEPS)
def case(request):
    """A kind of step."""
    return request.param


@pytest.fixture(scope="module")
def launches(case):
    """What one step launches on cards with warps of 32 and 64 threads. Nothing is computed, so no GPU is wanted."""
    return {lanes: launched(case, lanes) for lanes in (32, 64)}


def launched(case, lanes):
    """Kernel, arguments, constants and warps of all launches."""
    from hf_efcp import kernels
    from hf_efcp.kernels.triton import finite, model

    found = []

    def noted(kernel, grid, *arguments, warps=4, **constants):
        found.append((kernel, arguments, constants, warps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_LANES", lanes)
        patch.setattr(model, "_PRECISION", "ieee" if lanes == 64 else "tf32x3")
        for module in (finite, model):
            patch.setattr(module, "launch", noted)
        patch.setattr(kernels, "_check_triton", lambda device: None)
        params = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((768, 3072), (768,), (2, 768))]
        for param in params:
            param.grad = torch.ones_like(param)
        STEPS[case](params).step()
    return found


@needs_triton
def test_there_is_something_to_compile(launches):
    assert 6 <= len(launches[32]) == len(launches[64]) <= 12


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_spill_nothing(case, launches, target, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    lanes = TARGETS[target][2]
    for kernel, arguments, constants, warps in launches[lanes]:
        assert warps * lanes <= 1024  # threads of a block
        given = iter(arguments)
        signature, attributes = {}, {}
        constants = dict(constants)
        for place, name in enumerate(kernel.arg_names):
            if name not in constants:
                signature[name] = kind(value := next(given))
                # As a launch does; all addresses that it is given are multiples of 16.
                if isinstance(value, int) and value == 1:
                    constants[name] = value
                elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                    attributes[(place,)] = [["tt.divisibility", 16]]
            if name in constants:
                signature[name] = "constexpr"
        assert not list(given), kernel
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget(*TARGETS[target]),
            options={"num_warps": warps, "enable_fp_fusion": False},
        )
        assert compiled.metadata.shared <= 99 * 1024  # of a block on the smallest of them
        # Nothing is added in the order in which programs happen to come: two runs have the same bits.
        code = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
        assert not re.search(r"\b(?:atom|red)\.|(?:global|flat|buffer|ds)_(?:atomic|add)", code), kernel.fn.__name__
        if case in MAY_SPILL:
            continue
        if "cubin" in compiled.asm:
            assert resources(compiled.asm["cubin"], tmp_path)["STACK"] == 0, kernel.fn.__name__
        else:
            # Scalars may be kept in lanes of vectors; in memory there is nothing.
            memory = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)", compiled.asm["amdgcn"])
            assert memory == ["0", "0"], kernel.fn.__name__


def kind(argument):
    """How a signature calls an argument."""
    if isinstance(argument, torch.Tensor):
        return NAMES[argument.dtype]
    return "i32" if isinstance(argument, int) else "fp32"


def resources(cubin, folder):
    """What cuobjdump reports; Triton brings it."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    (folder / "kernel.cubin").write_bytes(cubin)
    report = subprocess.run(
        [tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


@needs_triton
def test_where_it_is_refused():
    """In a process of its own: another test may have imported Triton as an interpreter."""
    code = (
        "import torch\n"
        "from hf_efcp.kernels import choose\n"
        "print(choose('triton', torch.device('cuda')).NAME, choose('auto', torch.device('cuda', 1)).NAME)\n"
        "print(choose('auto', torch.device('mps')).NAME, choose('auto', torch.device('xpu')).NAME)\n"
        "choose('triton', torch.device('mps'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "triton triton\nreference reference\n"
    assert 'ValueError: backend="triton" runs on CUDA and ROCm, but the parameters are on mps' in run.stderr


@pytest.mark.parametrize(
    ("version", "message"), [(None, "import of triton halted"), ("3.1.0", "needs Triton 3.4 or later")]
)
def test_a_gpu_without_triton_is_warned_of_once(version, message, tmp_path):
    if version is not None:
        (tmp_path / "triton.py").write_text(f"__version__ = {version!r}\n")
    code = (
        "import sys, torch, warnings\n"
        + ("sys.modules['triton'] = None\n" if version is None else f"sys.path.insert(0, {str(tmp_path)!r})\n")
        + "from hf_efcp.kernels import choose\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(choose('auto', torch.device('cuda')).NAME, choose('auto', torch.device('cuda')).NAME, len(seen))\n"
        "print(seen[0].message)\n"
        "choose('triton', torch.device('cuda'))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.startswith("reference reference 1\nthe Triton kernels cannot be used"), run.stderr
    assert message in run.stdout
    assert 'ImportError: backend="triton" could not be loaded' in run.stderr
    assert 'pip install triton, or use backend="reference"' in run.stderr
