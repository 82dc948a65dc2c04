"""Settings: what is refused and how that is said, pairs, identity, and config files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.run.settings import NOT_IN_IDENTITY, Settings, make_settings, read_config

# A valid value that differs from the default, for every setting.
OTHER: dict[str, Any] = {
    "target": ("tumour",),
    "method": ("hirescam", "eigencam"),
    "layer": "layer3",
    "mpp": (0.25, 0.25),
    "replace_mpp": True,
    "patch_mpp": 1.0,
    "patch_px": (128, 128),
    "overlap": 0.5,
    "stride_px": 100,
    "min_tissue": 0.3,
    "tissue": "with-pen",
    "mask": Path("masks"),
    "include": ("tumour",),
    "exclude": ("fold",),
    "mask_frame": "bounds",
    "outlines": Path("drawn"),
    "allow_upsampling": True,
    "heatmap_stride": 8,
    "window": "uniform",
    "batch_size": 16,
    "span_patches": 512,
    "device": "cuda",
    "engine": "openvino",
    "precision": "bfloat16",
    "reader": "openslide",
    "trust_objective": True,
    "channels": (2, 1, 0),
    "decode": "scaled",
    "bag_method": ("lrp",),
    "feature_precision": "float16",
    "bag_baseline": "mean",
    "features": Path("features"),
    "feature_patch_um": 112.0,
    "feature_unit": "um",
    "feature_axes": "yx",
    "feature_name": "uni_v1",
    "allow_hosts": ("*.example.org",),
    "reader_threads": 4,
    "torch_threads": 3,
    "isolate": True,
    "isolate_memory": 4096,
    "isolate_seconds": 120.0,
    "max_unreadable": 0.5,
}


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_settings(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key", ["overlapp", "Overlap", "patch-px", ""])
def test_unknown_keys_are_refused_by_name(key: str) -> None:
    message = refusal(**{key: 1})
    assert f"{key}: unknown key, check the spelling" in message


def test_every_unknown_key_is_named() -> None:
    message = refusal(one=1, two=2)
    assert "one: unknown key" in message
    assert "two: unknown key" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mpp", "fine"),
        ("mpp", (0.5, 0.5, 0.5)),
        ("mpp", float("nan")),
        ("mpp", (0.5, float("inf"))),
        ("patch_mpp", 0),
        ("patch_mpp", -0.5),
        ("patch_mpp", float("inf")),
        ("patch_mpp", float("nan")),
        ("patch_px", 0),
        ("patch_px", (224, -1)),
        ("patch_px", 2.5),
        ("overlap", 1),
        ("overlap", -0.1),
        ("overlap", float("nan")),
        ("stride_px", 0),
        ("min_tissue", 1.1),
        ("min_tissue", -0.1),
        ("heatmap_stride", 0),
        ("window", "gauss"),
        ("batch_size", 0),
        ("span_patches", -32),
        ("reader_threads", 0),
        ("torch_threads", 0),
        ("max_unreadable", 2),
        ("target", 1.5),
        ("target", {"tumour": 1}),
        ("device", None),
    ],
)
def test_impossible_values_are_refused_with_key_and_value(key: str, value: object) -> None:
    message = refusal(**{key: value})
    assert key in message
    assert "given: " in message


@given(st.integers(1, 5000))
def test_the_heatmap_stride_must_be_a_power_of_two(stride: int) -> None:
    if stride in {2**i for i in range(1, 13)}:
        assert make_settings(heatmap_stride=stride).heatmap_stride == stride
    else:
        assert f"heatmap_stride is {stride}, expected a power of two such as 16" in refusal(heatmap_stride=stride)


def test_overlap_and_stride_exclude_each_other() -> None:
    assert "overlap and stride_px set the same thing" in refusal(overlap=0.5, stride_px=112)
    assert make_settings(overlap=0.0, stride_px=112).stride_px == 112


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_span_is_whole_batches(span: int, batch: int) -> None:
    if span % batch:
        assert f"span_patches is {span}, expected a multiple of batch_size {batch}" in refusal(
            span_patches=span, batch_size=batch
        )
    else:
        assert make_settings(span_patches=span, batch_size=batch).span_patches == span


@pytest.mark.parametrize(
    ("given", "kept"),
    [("tumour", ("tumour",)), (1, ("1",)), ([0, "b"], ("0", "b")), (("a",), ("a",)), ([], ())],
)
def test_targets_are_names(given: object, kept: tuple[str, ...]) -> None:
    assert make_settings(target=given).target == kept


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("mpp", 0.5, (0.5, 0.5)),
        ("mpp", [0.5, 0.4], (0.5, 0.4)),
        ("patch_px", 96, (96, 96)),
        ("patch_px", [96, 64], (96, 64)),
    ],
)
def test_one_value_stands_for_both_axes(key: str, given: object, kept: object) -> None:
    assert getattr(make_settings(**{key: given}), key) == kept


@pytest.mark.parametrize(
    ("settings", "stride"),
    [({}, (200, 100)), ({"overlap": 0.25}, (150, 75)), ({"stride_px": 60}, (60, 60)), ({"overlap": 0.999}, (1, 1))],
)
def test_stride_follows_overlap_or_is_given(settings: dict[str, Any], stride: tuple[int, int]) -> None:
    assert make_settings(**settings).stride((200, 100)) == stride


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2000))
def test_any_overlap_moves_on_and_leaves_no_gap(overlap: float, patch_px: int) -> None:
    stride, _ = make_settings(overlap=overlap).stride((patch_px, patch_px))
    assert 1 <= stride <= patch_px
    assert abs(stride - patch_px * (1 - overlap)) <= 1


def test_what_is_no_mapping_makes_no_settings() -> None:
    with pytest.raises(ValueError, match="valid dictionary"):
        Settings.model_validate(["overlap"])


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_settings().overlap = 0.5  # type: ignore[misc]


class TestIdentity:
    def test_the_table_of_other_values_is_complete(self) -> None:
        assert set(OTHER) == set(Settings.model_fields)

    @pytest.mark.parametrize("key", OTHER)
    def test_differs_where_the_result_may_differ(self, key: str) -> None:
        same = make_settings(**{key: OTHER[key]}).identity() == make_settings().identity()
        assert same == (key in NOT_IN_IDENTITY)

    def test_leaves_out_speed_patience_and_what_counts_slide_by_slide(self) -> None:
        left_out = {
            "allow_hosts",
            "bag_method",
            "decode",
            "isolate",
            "isolate_memory",
            "isolate_seconds",
            "feature_precision",
            "reader_threads",
            "torch_threads",
            "max_unreadable",
            "mask",
            "mask_frame",
            "outlines",
            "bag_baseline",
            "features",
            "feature_patch_um",
            "feature_unit",
            "feature_axes",
            "feature_name",
            "allow_upsampling",
            "mpp",
            "replace_mpp",
            "trust_objective",
        }
        known = set(make_settings(channels=(0, 1, 2)).identity())
        assert set(Settings.model_fields) - known == left_out == NOT_IN_IDENTITY
        assert known - set(make_settings().identity()) == {"channels"}  # which older versions did not have

    def test_survives_json(self) -> None:
        settings = make_settings(patch_mpp=0.3, target=["a", 1], patch_px=64, overlap=0.1)
        assert make_settings(**settings.identity()) == settings


class TestFile:
    def test_keys_and_values_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("overlap: 0.5\ntarget: [tumour, 1]\nmpp: 0.25\nlayer: null\n")
        settings = make_settings(**read_config(path))
        assert (settings.overlap, settings.target, settings.mpp) == (0.5, ("tumour", "1"), (0.25, 0.25))

    @pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
    def test_an_empty_file_changes_nothing(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        assert make_settings(**read_config(path)) == make_settings()

    def test_a_key_that_is_a_number_is_refused_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("7: 8\n")
        assert "7: unknown key" in refusal(**read_config(path))

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"- a\n- b\n", "expected keys and values"),
            (b"just words", "expected keys and values"),
            (b"a: [1, 2\nb: 3\n", "not a YAML file"),
            (b"\xff\xfe\x00", "not a YAML file"),
            (b"a: !!python/object/apply:os.getcwd []\n", "not a YAML file"),
        ],
    )
    def test_what_is_no_mapping_is_refused_on_one_line(self, tmp_path: Path, content: bytes, said: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"run\.yaml: {said}") as caught:
            read_config(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["gone.yaml", "."])
    def test_what_cannot_be_read_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=r"cannot be read: .*check the path"):
            read_config(tmp_path / name)
