"""A layer's output is read as the map it is: channels first, channels last, tokens; and what is no map is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.cam.facts import MAX_PREFIX_TOKENS, Layout, find_layout

SQUARE, WIDE, HIGH = (64, 64), (32, 64), (96, 32)


def layout_of(shape: tuple[int, ...], size: tuple[int, int]) -> Layout | None:
    return find_layout(torch.zeros(shape), torch.zeros(2, 3, *size))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 9, 4, 4), SQUARE, Layout("bkhw", 9, 4, 4)),
        ((2, 4, 4, 9), SQUARE, Layout("bhwk", 9, 4, 4)),
        ((2, 7, 4, 8), WIDE, Layout("bkhw", 7, 4, 8)),
        ((2, 4, 8, 7), WIDE, Layout("bhwk", 7, 4, 8)),
        ((2, 9, 3, 1), HIGH, Layout("bkhw", 9, 3, 1)),
        ((2, 9, 5, 4), SQUARE, Layout("bkhw", 9, 5, 4)),  # strides round
        ((2, 16, 9), SQUARE, Layout("bnk", 9, 4, 4)),
        ((2, 17, 9), SQUARE, Layout("bnk", 9, 4, 4, 1)),  # class token
        ((2, 18, 9), SQUARE, Layout("bnk", 9, 4, 4, 2)),  # and one of distillation
        ((2, 21, 9), SQUARE, Layout("bnk", 9, 4, 4, 5)),  # and four registers
        ((2, 33, 9), WIDE, Layout("bnk", 9, 4, 8, 1)),
        ((2, 28, 9), HIGH, Layout("bnk", 9, 9, 3, 1)),
        ((2, 12 * 12 + MAX_PREFIX_TOKENS, 9), SQUARE, Layout("bnk", 9, 12, 12, MAX_PREFIX_TOKENS)),
    ],
)
def test_a_map_is_found(shape: tuple[int, ...], size: tuple[int, int], expected: Layout) -> None:
    assert layout_of(shape, size) == expected


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((), SQUARE),
        ((2,), SQUARE),
        ((2, 9), SQUARE),
        ((2, 3, 4, 4, 4), SQUARE),
        ((0, 9, 4, 4), SQUARE),
        ((2, 9, 1, 1), SQUARE),
        ((2, 1, 9), SQUARE),  # one cell
        ((3, 9, 4, 4), SQUARE),
        ((1, 16, 9), SQUARE),  # not a map an image
        ((2, 9, 2, 7), SQUARE),
        ((2, 9, 8, 4), WIDE),
        ((2, 3, 9), SQUARE),  # other proportions
        ((2, 12 * 12 + MAX_PREFIX_TOKENS + 1, 9), SQUARE),  # and too many tokens for a prefix
    ],
)
def test_what_is_no_map_is_none(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    assert layout_of(shape, size) is None


def test_indices_and_masks_are_no_map() -> None:
    images = torch.zeros(2, 3, *SQUARE)
    assert find_layout(torch.zeros(2, 9, 4, 4, dtype=torch.int64), images) is None
    assert find_layout(torch.zeros(2, 9, 4, 4, dtype=torch.bool), images) is None
    assert find_layout(torch.zeros(2, 9, 4, 4, dtype=torch.bfloat16), images) is not None


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("proportion", [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_every_grid_of_tokens_is_found_with_the_prefixes_there_are(prefix: int, proportion: tuple[int, int]) -> None:
    """Below 5 cells a side 9 registers and a smaller grid are a larger grid with fewer."""
    for n in range(5, 33):
        height, width = n * proportion[0], n * proportion[1]
        found = layout_of((2, height * width + prefix, 7), (16 * height, 16 * width))
        assert found == Layout("bnk", 7, height, width, prefix)


def layouts() -> st.SearchStrategy[Layout]:
    size = st.integers(1, 5)
    plain = st.builds(Layout, st.sampled_from(["bkhw", "bhwk"]), size, size, size)
    return plain | st.builds(Layout, st.just("bnk"), size, size, size, st.integers(0, 3))


@given(layouts(), st.integers(1, 3))
def test_a_map_goes_into_an_output_and_comes_out_again(layout: Layout, count: int) -> None:
    cells, channels = layout.height * layout.width, layout.channels
    shape = {
        "bkhw": (count, channels, layout.height, layout.width),
        "bhwk": (count, layout.height, layout.width, channels),
        "bnk": (count, layout.prefix + cells, channels),
    }[layout.axes]
    value = torch.arange(count * (layout.prefix + cells) * channels).float()[: torch.Size(shape).numel()].reshape(shape)
    before = value.clone()
    maps = layout.to_map(value)
    assert maps.shape == (count, channels, layout.height, layout.width)
    assert torch.equal(layout.put(value, maps), value)
    changed = layout.put(value, -maps - 1)
    assert torch.equal(layout.to_map(changed), -maps - 1)
    if layout.axes == "bnk":
        assert torch.equal(changed[:, : layout.prefix], value[:, : layout.prefix])
    assert torch.equal(value, before)


def test_cells_keep_their_places() -> None:
    """Cell (y, x) of channel k is 100 y + 10 x + k, however it is stored."""
    y, x, k = torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij")
    last = (100 * y + 10 * x + k).float()[None]
    expected = last.permute(0, 3, 1, 2)
    tokens = torch.cat([torch.full((1, 1, 4), -1.0), last.reshape(1, 6, 4)], dim=1)
    assert torch.equal(Layout("bkhw", 4, 2, 3).to_map(expected), expected)
    assert torch.equal(Layout("bhwk", 4, 2, 3).to_map(last), expected)
    assert torch.equal(Layout("bnk", 4, 2, 3, 1).to_map(tokens), expected)


def test_gradients_pass_through_a_map_to_its_tokens_alone() -> None:
    value = torch.zeros(1, 5, 3, requires_grad=True)
    Layout("bnk", 3, 2, 2, 1).to_map(value).sum().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert value.grad[0].sum(dim=1).tolist() == [0, 3, 3, 3, 3]
