"""The compiled search picks what the plain one picks; where it cannot be had, nobody misses it."""

import os
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from literally import ROUNDING, worst_step
from vla_pruner.kernels import compiled as compiled_by
from vla_pruner.kernels import native
from vla_pruner.pruning.selection import _search_in_numpy, max_min_filter

compiled = pytest.mark.skipif(
    native.state().startswith("not compiled"), reason=f"the search is {native.state()}"
)
DTYPE = st.sampled_from([torch.float32, torch.bfloat16])
# Around the edges of tiles (4 to 32), of pieces (128 words, so 256 bf16 numbers), and odd ones.
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 254, 256, 258, 511, 700]))


def plain(features: Tensor, k: int, nearest: bool, index: Tensor | None = None) -> list[int]:
    index = torch.arange(len(features)) if index is None else index
    return _search_in_numpy(features, index, k, nearest)[0].tolist()


def fast(features: Tensor, k: int, nearest: bool, index: Tensor | None = None) -> list[int]:
    index = torch.arange(len(features)) if index is None else index
    found = native.max_min_search(features, index, k, nearest)
    assert found is not None
    picks, length = found
    torch.testing.assert_close(length, native.lengths(features, index), rtol=1e-5, atol=0)
    return picks.tolist()


@compiled
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), SIZES, DIMS, DTYPE, st.booleans(), st.data())
def test_every_pick_is_the_farthest_token_up_to_rounding(seed, size, dim, dtype, nearest, data):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, dim, generator=generator)
    features += 3 * torch.randn(1, dim, generator=generator)  # As alike as visual tokens are.
    features = features.to(dtype)
    k = data.draw(st.integers(1, size))
    picks = fast(features, k, nearest)
    assert len(set(picks)) == k
    assert worst_step(features, picks, nearest) < ROUNDING
    assert worst_step(features, plain(features, k, nearest), nearest) < ROUNDING


@compiled
@settings(max_examples=80, deadline=None)
@given(SIZES, DIMS, DTYPE, st.booleans(), st.data())
def test_ties_are_broken_alike(size, dim, dtype, nearest, data):
    axes = data.draw(st.lists(st.integers(0, dim - 1), min_size=size, max_size=size))
    signs = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=size, max_size=size)
    )
    features = torch.zeros(size, dim)
    features[torch.arange(size), torch.tensor(axes)] = torch.tensor(signs)
    features = features.to(dtype)
    k = data.draw(st.integers(1, size))
    assert fast(features, k, nearest) == plain(features, k, nearest)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["slice", "odd slice", "columns", "transposed", "backwards"])
def test_rows_may_lie_anywhere_in_memory(view, dtype):
    large = torch.randn(60, 135, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = {
        "slice": large[3:50, :64],
        "odd slice": large[3:50, 1:64],  # bf16 numbers that do not start at a whole word.
        "columns": large[:, ::3],
        "transposed": large[:, :60].T,
        "backwards": large.flip(0)[:, 2:66],
    }[view]
    index = torch.tensor([5, 6, 9, 11, 12, 30, 31, 40, 44, 45])
    contiguous = features.index_select(0, index).clone()
    expected = plain(contiguous, 7, False)
    assert fast(features, 7, False, index) == expected
    assert fast(features, 7, False, index.repeat_interleave(2)[::2]) == expected


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype):
    features = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.get_num_threads()
    try:
        picks = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            picks.append(fast(features, 200, False))
    finally:
        torch.set_num_threads(before)
    assert picks[0] == picks[1] == picks[2]
    assert worst_step(features, picks[0], False) < ROUNDING


@compiled
def test_memory_of_a_search_says_nothing_to_the_next():
    features = torch.randn(150, 90, generator=torch.Generator().manual_seed(0))
    expected = fast(features[:37], 20, True)
    for other in (features, torch.full((150, 90), float("nan")), 1e30 * features):
        native.max_min_search(other, torch.arange(150), 90, True)
        assert fast(features[:37], 20, True) == expected


@compiled
def test_more_candidates_than_memory_is_kept_for():
    features = torch.randn(4200, 8, generator=torch.Generator().manual_seed(0))
    picks = fast(features, 40, True)
    assert worst_step(features, picks, True) < ROUNDING
    assert len(native._memory.words) <= native._KEPT


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_that_are_not_finite_come_back(value, dtype):
    features = torch.randn(40, 30).to(dtype)
    features[17, 3] = value
    _, length = native.max_min_search(features, torch.arange(40), 30, False)
    assert torch.isfinite(length).logical_not().nonzero().flatten().tolist() == [17]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_and_absent_features_are_far_from_everything(dtype):
    features = torch.eye(6, 8)[[0, 0, 1, 1, 2, 2]].to(dtype)
    features[3], features[5] = 0.0, 1e-25
    assert fast(features, 6, False) == plain(features, 6, False)


@pytest.fixture
def state(monkeypatch):
    """`native.state()` in another environment, as a new process would find it."""

    def ask(**environment: str) -> str:
        with monkeypatch.context() as patch:
            patch.delenv("VLA_PRUNER_COMPILE", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            native._library.cache_clear()
            return native.state()

    yield ask
    native._library.cache_clear()


def test_without_a_compiler_the_plain_search_does_it(state, tmp_path):
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    expected = plain(features, 9, False)
    assert max_min_filter(features, 9).tolist() == expected
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho cannot work today >&2\nexit 1\n")
    broken.chmod(0o755)
    for environment, reason in [
        ({"VLA_PRUNER_COMPILE": "0"}, "VLA_PRUNER_COMPILE=0"),
        ({"PATH": str(tmp_path / "nowhere"), "CC": ""}, "apt-get install gcc"),
        ({"CC": str(broken)}, "cannot work today"),
        ({"CC": str(tmp_path / "absent")}, "No such file"),
    ]:
        said = state(**environment)
        assert said.startswith("not compiled (") and reason in said
        assert native.max_min_search(features, torch.arange(40), 9, False) is None
        assert max_min_filter(features, 9).tolist() == expected


@compiled
def test_the_compiler_finds_nothing_to_warn_of():
    flags = [flag for flag in compiled_by.FLAGS if flag != "-shared"]
    compiled_by._run(
        [
            *compiled_by._compiler(),
            *flags,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            *map(str, compiled_by.SOURCES),
        ]
    )


@compiled
def test_it_is_compiled_once(state, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in state(XDG_CACHE_HOME=str(file))
    first = state(XDG_CACHE_HOME=str(tmp_path))
    (built,) = (tmp_path / "vla-pruner").iterdir()
    stamp = built.stat().st_mtime_ns
    assert first.startswith("compiled by ")
    assert state(XDG_CACHE_HOME=str(tmp_path)) == first
    assert [built] == list((tmp_path / "vla-pruner").iterdir())
    assert built.stat().st_mtime_ns == stamp


@pytest.mark.slow
@compiled
def test_what_a_run_before_left_is_built_again_unless_it_is_as_built(state, tmp_path):
    """Cut off by a full disk, changed, another library, writable by others, a link, misnamed."""
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    expected = plain(features, 9, False)
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    foreign = tmp_path / "foreign.so"
    subprocess.run([*compiled_by._compiler(), "-shared", "-fPIC", empty, "-o", foreign], check=True)
    folder = tmp_path / "vla-pruner"
    first = state(XDG_CACHE_HOME=str(tmp_path))
    (path,) = folder.iterdir()
    whole = path.read_bytes()

    def planted(content: bytes, mode: int = 0o600) -> None:
        path.unlink()
        path.write_bytes(content)
        path.chmod(mode)

    for damage in (
        lambda: planted(whole[:12000]),
        lambda: planted(b""),
        lambda: planted(whole[:-1] + bytes([whole[-1] ^ 1])),
        lambda: planted(foreign.read_bytes()),
        lambda: planted(whole, 0o666),
        lambda: (path.unlink(), path.symlink_to(foreign)),
        lambda: path.rename(path.with_name(path.name.replace("-", "-0"))),
    ):
        damage()
        assert state(XDG_CACHE_HOME=str(tmp_path)) == first
        assert path.read_bytes() == whole and path.stat().st_mode & 0o777 == 0o600
        assert not path.is_symlink()
        assert max_min_filter(features, 9).tolist() == expected


@compiled
def test_a_folder_that_others_may_write_to_is_closed_to_them(state, tmp_path):
    folder = tmp_path / "vla-pruner"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    assert state(XDG_CACHE_HOME=str(tmp_path)).startswith("compiled by ")
    assert folder.stat().st_mode & 0o777 == 0o700


@compiled
def test_another_users_folder_is_left_alone(state, tmp_path, monkeypatch):
    (tmp_path / "vla-pruner").mkdir()
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert "belongs to another user" in state(XDG_CACHE_HOME=str(tmp_path))
    assert not list((tmp_path / "vla-pruner").iterdir())


@compiled
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_another_users_library_is_not_loaded(state, tmp_path):
    first = state(XDG_CACHE_HOME=str(tmp_path))
    (path,) = (tmp_path / "vla-pruner").iterdir()
    os.chown(path, 65534, 65534)
    assert state(XDG_CACHE_HOME=str(tmp_path)) == first
    assert path.stat().st_uid == 0


@compiled
def test_any_compiler_may_fail(state, tmp_path):
    """Words that cannot be read, output that is no text, libraries with another or no search."""
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    expected = plain(features, 9, False)
    (gcc,) = compiled_by._compiler()

    def script(name: str, lines: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    def makes(name: str, source: str) -> str:
        """A compiler that makes this of every source."""
        (tmp_path / f"{name}.c").write_text(source)
        library = tmp_path / f"{name}.so"
        command = [gcc, "-shared", "-fPIC", tmp_path / f"{name}.c", "-o", library]
        subprocess.run(command, check=True)
        copy = f'while [ $# -gt 0 ]; do [ "$1" = -o ] && cp {library} "$2"; shift; done'
        return script(name, copy)

    words = ("memory_words", "choice_words", "column_mean_words", "determinant_words")
    others = ("reads_bf16", "top_k", "combine_then_filter", "column_mean", "determinant_search")
    head = "".join(f"long {name}(void) {{ return 99; }}\n" for name in words)
    head += "".join(f"int {name}(void) {{ return 0; }}\n" for name in others)
    for cc, reason in {
        'gcc "': "No closing quotation",
        script("bytes", r"printf '\377\376'"): "No such file",
        script("loud", r"printf '\377\376' >&2; exit 1"): "failed",
        makes("nothing", "int nothing;\n"): "without the search",
        makes("half", head): "without the search",
        makes("idle", head + "int max_min_search(void) { return 1; }\n"): "wrong answers",
        makes("lying", head + "int max_min_search(void) { return 0; }\n"): "",
        script("text", 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo no > "$2"; shift; done'): "",
    }.items():
        said = state(CC=cc, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert said.startswith("not compiled (") and reason in said and len(said) < 400
        assert max_min_filter(features, 9).tolist() == expected


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_its_tensors_is_read_or_written(dtype):
    features = torch.randn(20, 8).to(dtype)
    index = torch.arange(20)
    for wrong, k, said in [
        ((features, torch.tensor([0, 20])), 1, r"index names 0\.\.20"),
        ((features, torch.tensor([-1, 3])), 1, r"index names -1\.\.3"),
        ((features, index), 0, "`k=0`"),
        ((features, index), 21, "`k=21`"),
        ((features, index[:0]), 1, "`k=1`"),
        ((features, index.int()), 3, "int64"),
        ((features, index[None]), 3, r"\[m\]"),
        ((features.double(), index), 3, "float64"),
        ((features[None], index), 3, r"\[n, d\]"),
        ((features.to("meta"), index), 3, "CPU"),
    ]:
        with pytest.raises(ValueError, match=said):
            native.max_min_search(*wrong, k, False)
    library, _ = native._library()
    picks, nothing = torch.full((3,), -7), 0
    for rows, n, k in [(20, 20, 21), (20, 20, 0), (19, 20, 3)]:
        done = library.max_min_search(
            nothing, index.data_ptr(), nothing, rows, n, 8, 8, 0, k, 0, 1, nothing, picks.data_ptr()
        )
        assert done == 0 and picks.tolist() == [-7, -7, -7]
