"""ttmfs.torch with a real PyTorch, on a real mount. ``make test-torch`` runs it; ``make test`` has no PyTorch."""

import gc
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from harness import REPOSITORY, Mount, run, set_attribute
from ttmfs.client import Backup
from ttmfs.client.activations import FreePages
from ttmfs.errors import InvalidArgument, NoRoom
from ttmfs.torch import EvictActivations

PAGE = os.sysconf("SC_PAGE_SIZE")
WAYS = {"natively": True, "through the mount": False}


class Everything(nn.Module):  # type: ignore[misc] # the type checker does not see PyTorch
    """Layers that save tensors in many ways: outputs, views, transposes, integers, booleans, other memory orders."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.attention = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 48), nn.ReLU())
        self.convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.attention(self.words(tokens)))
        image = x.reshape(len(tokens), 3, 16, 16).to(memory_format=torch.channels_last)
        return torch.fft.rfft(self.convolution(image).exp().clamp(max=3)).abs().sum() + x[:, ::2].pow(2).mean()


def gradients(model: nn.Module, tokens: torch.Tensor, *, around: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)  # dropout
    model.zero_grad()
    with around:
        loss = model(tokens)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(params=WAYS)
def backup(request: pytest.FixtureRequest, shared: Mount) -> Iterator[Backup]:
    with Backup.create(shared.path / "a", 64 << 20, native=WAYS[request.param]) as made:
        yield made


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 100, (4, 16))


def test_gradients_are_identical_bit_for_bit(backup: Backup, tokens: torch.Tensor) -> None:
    model = Everything()
    expected = gradients(model, tokens, around=torch.enable_grad())
    assert same(gradients(model, tokens, around=torch.enable_grad()), expected), "the model itself repeats"
    evicting = EvictActivations(backup, threshold=1)
    for _ in range(3):
        assert same(gradients(model, tokens, around=evicting), expected)
    found = evicting.evictions
    assert found.evicted > 60
    assert found.brought_back >= found.evicted - 6, "what autograd saves and does not use is not read"
    assert (found.kept_without_room, found.bytes_in_backup) == (0, 0)
    assert not len(backup.handles()), "the pages were dropped"


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1),
    "every second": lambda t: t[..., ::2],
    "a part": lambda t: t[1:, ..., 1:],
    "permuted": lambda t: t.permute(*reversed(range(t.ndim))),
    "reversed": lambda t: t.flip(0),
    "a part of a transposed one": lambda t: t.transpose(0, -1)[..., 1:],
}
TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool,
    torch.int8, torch.uint8, torch.int16, torch.int64,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.resolve_conj().resolve_neg().flatten().clone().view(torch.uint8).numpy())


def test_tensors_of_every_type_and_layout_come_back_with_both(backup: Backup) -> None:
    evicting = EvictActivations(backup, threshold=1)

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(
        st.sampled_from(TYPES), st.lists(st.integers(1, 40), min_size=2, max_size=4), st.sampled_from(sorted(LAYOUTS))
    )
    def come_back(dtype: torch.dtype, shape: list[int], layout: str) -> None:
        count = int(np.prod(shape)) * dtype.itemsize
        memory = torch.from_numpy(np.random.default_rng(count).integers(0, 2, count, np.uint8))
        tensor = LAYOUTS[layout](memory.view(dtype).reshape(shape))
        packed = evicting._pack(tensor)
        again = evicting._unpack(packed)
        assert (again is tensor) == (not tensor.numel()), "only an empty one stays"
        assert (again.shape, again.dtype, again.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert bits(again) == bits(tensor)

    come_back()
    conjugate = torch.randn(50, 50, dtype=torch.complex64).conj()
    assert torch.equal(evicting._unpack(evicting._pack(conjugate)), conjugate)
    gc.collect()
    assert evicting.evictions.bytes_in_backup == 0
    assert not len(backup.handles())


def test_what_would_free_no_memory_stays(backup: Backup) -> None:
    class Own(torch.Tensor):  # type: ignore[misc]
        pass

    evicting = EvictActivations(backup, threshold=4096)
    parameter, leaf = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64, requires_grad=True)
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    for tensor in (
        parameter, parameter.t(), parameter[1:], frozen, frozen.t(), leaf, leaf.view(-1), torch.randn(32, 31),
        torch.empty(0), torch.empty(0, 5000), torch.randn(1, 64).expand(64, 64), torch.randn(64, 64).to_sparse(),
        torch.randn(64, 64).as_subclass(Own),
    ):  # fmt: skip
        assert evicting._unpack(evicting._pack(tensor)) is tensor
    evicting._pack(torch.randn(32, 32))
    assert evicting.evictions.evicted == 1, "of the size of the threshold"


def test_a_graph_is_used_twice_and_differentiated_twice(backup: Backup) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)

    def results(around: Any) -> list[torch.Tensor]:
        with around:
            loss = (weight.exp() @ weight.sin()).tanh().sum()
            (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), weight, retain_graph=True)
        (third,) = torch.autograd.grad(first.pow(2).sum(), weight)
        return [first.detach(), second, third]

    evicting = EvictActivations(backup, threshold=1)
    assert same(results(evicting), results(torch.enable_grad()))
    assert evicting.evictions.brought_back > evicting.evictions.evicted
    gc.collect()
    assert evicting.evictions.bytes_in_backup == 0
    assert not len(backup.handles())


def test_a_graph_that_is_thrown_away_leaves_no_page(backup: Backup, tokens: torch.Tensor) -> None:
    evicting = EvictActivations(backup, threshold=1)
    with evicting:
        loss = Everything()(tokens)
    assert evicting.evictions.bytes_in_backup > 0
    assert len(backup.handles()) > 50
    del loss
    gc.collect()
    assert evicting.evictions.bytes_in_backup == 0
    assert not len(backup.handles())


@pytest.mark.parametrize("limit", ["the backup", "the mount"])
def test_without_room_tensors_stay_in_memory_and_are_counted(
    backup: Backup, shared: Mount, tokens: torch.Tensor, limit: str
) -> None:
    model = Everything()
    expected = gradients(model, tokens, around=torch.enable_grad())
    if limit == "the backup":
        backup.resize(10 * PAGE)
    else:
        set_attribute(shared.path, "size", 10 * PAGE)
    evicting = EvictActivations(backup, threshold=1)
    assert same(gradients(model, tokens, around=evicting), expected)
    assert evicting.evictions.evicted > 0
    assert evicting.evictions.kept_without_room > 10
    assert not len(backup.handles()), "no part of a tensor stays"
    with pytest.raises(NoRoom), EvictActivations(backup, threshold=1, on_no_room="raise"):
        model(tokens)
    gc.collect()
    assert not len(backup.handles())


def test_threads_train_at_the_same_time(backup: Backup) -> None:
    """Forward in one thread, backward in another: eight of each."""
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(8)]

    def loss_of(weight: torch.Tensor) -> torch.Tensor:
        return (weight.exp() @ weight.sin()).tanh().sum()

    expected = [torch.autograd.grad(loss_of(weight), weight)[0] for weight in weights]
    evicting = EvictActivations(backup, threshold=1)
    failures: list[BaseException] = []

    def forward(number: int) -> None:
        try:
            for _ in range(10):
                with evicting:
                    losses = [loss_of(weights[number])]
                thread = threading.Thread(target=backward, args=(number, losses))
                thread.start()
                thread.join(60)
        except BaseException as error:
            failures.append(error)

    def backward(number: int, losses: list[torch.Tensor]) -> None:
        try:
            assert torch.equal(torch.autograd.grad(losses.pop(), weights[number])[0], expected[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=forward, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    gc.collect()
    assert evicting.evictions.bytes_in_backup == 0
    assert not len(backup.handles())


def test_a_tensor_that_stayed_and_was_changed_is_refused_as_without_eviction(backup: Backup) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    with EvictActivations(backup, threshold=1):
        loss = (weight * weight).sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with EvictActivations(backup, threshold=1 << 20):
        small = weight.exp()  # an operation saves its own result
    small.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        small.sum().backward()


def test_what_is_not_saved_inside_is_not_evicted(backup: Backup, tokens: torch.Tensor) -> None:
    evicting = EvictActivations(backup, threshold=1)
    with evicting, evicting:
        pass
    Everything()(tokens).backward()
    assert evicting.evictions.evicted == 0


def test_wrong_arguments_are_refused(backup: Backup) -> None:
    for arguments in {"threshold": 0}, {"on_no_room": "wait"}:
        with pytest.raises(InvalidArgument):
            EvictActivations(backup, **arguments)
    backup.backup_page(bytes(PAGE), 3)
    with pytest.raises(InvalidArgument, match="holds pages already"):
        EvictActivations(backup)


@hypothesis.given(st.lists(st.integers(1, 12), max_size=30), st.randoms())
def test_free_pages_are_each_given_once(counts: list[int], chance: Any) -> None:
    free, taken = FreePages(64), dict[int, int]()
    for count in counts:
        if taken and chance.random() < 0.4:
            first = chance.choice(sorted(taken))
            free.give(first, first + taken.pop(first))
        elif (first := free.take(count)) is not None:
            taken[first] = count
        used = [idx for first, length in taken.items() for idx in range(first, first + length)]
        left = [idx for first, past in free.runs for idx in range(first, past)]
        assert sorted(used + left) == list(range(64))
        assert all(past < first for (_, past), (first, _) in zip(free.runs, free.runs[1:], strict=False)), (
            "runs are merged"
        )


def test_the_examples_of_the_document_print_what_they_show(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/pytorch.md").read_text()
    for file, code in re.findall(r"^```python\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / file).write_text(code)
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "mnt").mkdir()
    examples = re.findall(r"^```console torch\n\$ (.*)\n((?s:.*?))^```$", text, re.MULTILINE)
    assert len(examples) == 3
    with Mount(tmp_path / "mnt", "size=2g"):
        for command, expected in examples:
            shown = run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": python})
            assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), shown), shown
