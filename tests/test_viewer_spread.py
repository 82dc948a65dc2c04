"""The spread of overlapping patches in the viewer: as an audit stored it, and never a reason not to show the slide."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.servers import BUCKET, CREDENTIALS, put_folder
from tests.viewer_runs import client, facts_of, make_run, plant_audit, tiles_of
from wsi_gradcam import audit_run
from wsi_gradcam.audit.plan import AuditFolder
from wsi_gradcam.geometry import Region
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.results.heatmap import EXPLAINED, HeatmapStore
from wsi_gradcam.results.run import open_result

OWN = 6  # two methods and the probability, for two classes
SLIDE = "inner/b.tif"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("spread"), overlap=0.25)


@pytest.fixture(scope="module")
def audited(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "out"
    shutil.copytree(whole, out)
    audit_run(out, patches=16, only=("stability",))
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A run with a planted audit, to be spoilt."""
    shutil.copytree(whole, tmp_path / "out")
    plant_audit(tmp_path / "out", SLIDE)
    return tmp_path / "out"


@pytest.fixture
def server(out: Path) -> Iterator[TestClient]:
    with client(out) as found:
        yield found


def unsure(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The channels of the spread."""
    return [channel for channel in facts["channels"] if channel["method"] == "spread"]


def tile(facts: dict[str, Any], number: int = 0, level: int | None = None, kind: str = "heat") -> str:
    """The address of the first tile of a channel of the spread; without a level, of the coarsest."""
    wanted = facts["heat"]["levels"] - 1 if level is None else level
    return f"{tiles_of(facts)}/{kind}/{unsure(facts)[number]['address']}/{wanted}/0_0.png"


def decoded(data: bytes, channel: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Values and coverage of a tile."""
    rgb = np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)
    low, high = channel["scale"]
    return low + (rgb[..., 0] * 256 + rgb[..., 1]) * (high - low) / 65535, rgb[..., 2]


def values_at(server: TestClient, facts: dict[str, Any], y: float, x: float) -> list[float | None]:
    found: list[float | None] = server.get(f"/api/slides/{facts['key']}/values?y={y}&x={x}").json()["values"]
    return found


@pytest.mark.parametrize("slide_id", ["a.tif", SLIDE])
def test_what_an_audit_has_stored_is_shown_after_the_slide_s_own(audited: Path, slide_id: str) -> None:
    store = HeatmapStore(audited / "audit" / slide_id / "spread.ome.zarr", read_only=True)
    with client(audited) as server:
        facts, result = facts_of(server, slide_id), open_result(audited)[slide_id]
        labels = [channel["label"] for channel in facts["channels"]]
        assert labels == [*(c.label for c in result.channels), "spread: other", "spread: marker"]
        assert [(c["target"], c["unit"], c["run_window"]) for c in unsure(facts)] == [
            ("other", "logit", None),
            ("marker", "logit", None),
        ]
        assert [c["window"][1] for c in unsure(facts)] == [c.end for c in store.channels]
        for y, x in ((20, 30), (500, 600), (1002, 1140)):
            at = Region(y // result.stride_px, x // result.stride_px, 1, 1)
            known = bool(store.read_flags(0, at)[0, 0] & EXPLAINED)
            stored = [float(store.read(0, number, at)[0, 0]) if known else None for number in range(2)]
            assert values_at(server, facts, y, x)[OWN:] == pytest.approx(stored, abs=1e-6)
        finer = facts["heat"]["finer"]
        for level in range(len(result.levels)):
            values, flags = decoded(server.get(tile(facts, 1, level + finer)).content, unsure(facts)[1])
            region = Region(0, 0, *flags.shape)
            span = unsure(facts)[1]["scale"][1] - unsure(facts)[1]["scale"][0]
            np.testing.assert_allclose(values, store.read(level, 1, region), atol=span / 65535)
            np.testing.assert_array_equal(flags, store.read_flags(level, region))


def test_links_between_the_audit_s_pages_hold_through_the_viewer(audited: Path) -> None:
    with client(audited) as server:
        archive = server.get("/api/run").json()["audit"]
        pages = [urljoin(archive, unescape(link)) for link in _links(server.get(archive).text)]
        assert sorted(pages) == sorted(facts_of(server, name)["audit"] for name in ("a.tif", SLIDE))
        for page in pages:
            assert [urljoin(page, unescape(link)) for link in _links(server.get(page).text)] == [archive]


def _links(html: str) -> list[str]:
    return [link for link in re.findall(r'href="([^"]*)"', html) if not link.startswith("#")]


def test_tiles_have_the_spread_s_own_coverage_and_are_kept_for_ever(server: TestClient) -> None:
    facts = facts_of(server, SLIDE)
    for kind in ("heat", "cells"):
        answer = server.get(tile(facts, 1, 0, kind))
        assert "immutable" in answer.headers["cache-control"]
        values, flags = decoded(answer.content, unsure(facts)[1])
        assert (flags == EXPLAINED).all()  # the left half
        assert (np.diff(values, axis=1) >= 0).all()
    values, flags = decoded(server.get(tile(facts)).content, unsure(facts)[0])
    half = flags.shape[1] // 2
    assert (flags[:, :half] == EXPLAINED).all()
    assert (flags[:, half:] == 0).all()
    np.testing.assert_allclose(values, np.broadcast_to(np.linspace(0, 1, flags.shape[1]), flags.shape), atol=1e-4)
    height, width = facts["size_px"]
    assert values_at(server, facts, height / 2, width * 0.7)[OWN:] == [None, None]
    left = values_at(server, facts, height / 2, width / 4)
    assert left[OWN:] == pytest.approx([0.25, 0.125], abs=0.01)
    assert len(left) == len(facts["channels"])


@pytest.mark.parametrize(
    "name",
    [
        "heat/spread-{digest}/2/0/0_0.png",
        "heat/spread-{digest}/-1/0/0_0.png",
        "heat/spread-{digest}/0/99/0_0.png",
        "heat/spread-0123456789ab/0/0/0_0.png",
        "heat/spread-/0/0/0_0.png",
        "heat/spread-../0/0/0_0.png",
    ],
)
def test_absurd_tiles_are_refused(server: TestClient, name: str) -> None:
    facts = facts_of(server, SLIDE)
    digest = unsure(facts)[0]["address"].partition("/")[0].removeprefix("spread-")
    assert server.get(f"{tiles_of(facts)}/{name.format(digest=digest)}").status_code == 404


def test_a_slide_that_was_audited_anew_has_other_addresses(server: TestClient, out: Path) -> None:
    before = facts_of(server, SLIDE)
    kept = server.get(tile(before)).content
    plant_audit(out, SLIDE, 3.0)
    after = facts_of(server, SLIDE)
    assert tile(after) != tile(before)
    assert unsure(after)[0]["window"] == [0, 3.0]
    values, _ = decoded(server.get(tile(after)).content, unsure(after)[0])
    assert values.max() == pytest.approx(3.0, abs=1e-3)
    assert server.get(tile(before)).content == kept  # of the page that is open still
    gone = server.get(tile(before, 1))  # was not asked for in time
    assert gone.status_code == 404
    assert "reload the page" in gone.json()["error"]
    assert gone.headers["cache-control"] == "no-store"


def test_what_is_read_while_an_audit_removes_it_is_not_kept(
    server: TestClient, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that are removed look like chunks of zeros."""
    facts, plan = facts_of(server, SLIDE), out / "audit" / "plan.json"
    read = HeatmapStore.read

    def disturbed(self: HeatmapStore, *given: Any) -> Any:
        plan.unlink()
        return 0 * read(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(HeatmapStore, "read", disturbed)
        assert server.get(tile(facts)).status_code == 404
    plan.write_bytes(b"{}")
    values, _ = decoded(server.get(tile(facts)).content, unsure(facts)[0])
    assert values.max() == pytest.approx(1.0, abs=1e-3)


def _forget(name: str) -> Callable[[AuditFolder], None]:
    return lambda folder: (getattr(folder, name)(SLIDE) if name != "plan" else folder.plan).remove()


def _write(name: str, text: bytes) -> Callable[[AuditFolder], None]:
    return lambda folder: (folder.place / SLIDE / name).write(text)


def _anew(**about: Any) -> Callable[[AuditFolder], None]:
    def spoil(folder: AuditFolder) -> None:
        plant_audit(Path(str(folder.place.parent)), SLIDE, **about)

    return spoil


TROUBLES: dict[str, tuple[Callable[[AuditFolder], None], str]] = {
    "under way": (_forget("spread_means"), ""),
    "begun again": (_forget("plan"), "audited again"),
    "no image": (lambda folder: folder.spread(SLIDE).remove_tree(), "cannot be read"),
    "no metadata": (_write("spread.ome.zarr/zarr.json", b"{"), "cannot be read"),
    "other metadata": (_write("spread.ome.zarr/zarr.json", b'{"zarr_format":3,"node_type":"group"}'), "cannot be read"),
    "means damaged": (_write("spread.json", b"{"), "damaged"),
    "means no table": (_write("spread.json", b"[]"), "damaged"),
    "method not known": (_anew(method="nonsense"), "cannot be read"),
    "a window of NaN": (_anew(spread=float("nan")), "cannot be read"),
    "another size": (_anew(shape=(9, 9)), "explained again"),
    "another run": (_anew(run="another"), "explained again"),
    "another slide": (_anew(slide="another"), "explained again"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_with_a_spread_leaves_the_slide_as_it_is(out: Path, name: str) -> None:
    trouble, said = TROUBLES[name]
    with client(out) as server:
        before = facts_of(server, SLIDE)
    trouble(AuditFolder(LocalPath(out) / "audit"))
    with client(out) as server:
        facts = facts_of(server, SLIDE)
        assert facts["channels"] == before["channels"][:OWN]
        assert said in (facts["spread_problem"] or "")
        assert bool(facts["spread_problem"]) == bool(said)
        assert len(values_at(server, facts, 300, 300)) == OWN
        assert server.get(tile(before)).status_code >= 400
        assert server.get(f"{tiles_of(facts)}/heat/0/0/0_0.png").status_code == 200


def test_a_damaged_chunk_is_a_tile_that_is_not_there(server: TestClient, out: Path) -> None:
    facts = facts_of(server, SLIDE)
    shard = out / "audit" / SLIDE / "spread.ome.zarr" / "0" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-40] + bytes(range(40)))
    answer = server.get(tile(facts, 1, 0))
    assert answer.status_code == 404
    assert "cannot be read" in answer.json()["error"]
    values = values_at(server, facts, 300, 300)
    assert values[OWN:] == [None, None]
    assert None not in values[:OWN]


@pytest.mark.parametrize(
    "link", [".", SLIDE, f"{SLIDE}/spread.json", f"{SLIDE}/spread.ome.zarr", f"{SLIDE}/spread.ome.zarr/0/c"]
)
def test_links_out_of_out_are_refused(server: TestClient, out: Path, tmp_path: Path, link: str) -> None:
    place, before = out / "audit" / link, facts_of(server, SLIDE)
    shutil.move(place, tmp_path / "away")
    place.symlink_to(tmp_path / "away")
    with client(out) as fresh:
        facts = facts_of(fresh, SLIDE)
        assert len(facts["channels"]) == OWN
        assert "leads out" in facts["spread_problem"]
        assert fresh.get(tile(before)).status_code == 403
        assert fresh.get("/files/audit/inner/b.tif/report.html").status_code == (200 if "spread" in link else 403)


def test_slides_that_nobody_opens_cost_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: AuditFolder, slide_id: str) -> None:
        raise AssertionError(slide_id)

    monkeypatch.setattr(AuditFolder, "read_spread", read)
    with client(out) as server:
        end = time.monotonic() + 30
        while server.get("/api/slides").json()["scored"] < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(AssertionError, match=r"b\.tif"):
            facts_of(server, SLIDE)


def test_a_spread_in_an_object_store_is_the_same(out: Path, s3_upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_upstream}.items():
        monkeypatch.setenv(name, value)
    put_folder(s3_upstream, out, "viewer/spread")
    with client(out) as here, client(f"s3://{BUCKET}/viewer/spread") as there:
        facts = facts_of(here, SLIDE)
        assert facts_of(there, SLIDE) == facts
        assert len(unsure(facts)) == 2
        for address in (
            tile(facts),
            tile(facts, 1, 0),
            "/files/audit/inner/b.tif/report.html",
            "/files/audit/report.html",
        ):
            answers = [server.get(address) for server in (here, there)]
            assert [answer.status_code for answer in answers] == [200, 200], address
            assert answers[0].content == answers[1].content, address
        assert values_at(there, facts, 300, 300) == values_at(here, facts, 300, 300)
