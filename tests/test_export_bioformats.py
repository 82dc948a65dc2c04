"""Bio-Formats, with which QuPath, OMERO and Fiji read, finds the levels, sizes and values of our OME-TIFF.

Needs Java and Bio-Formats' package of all readers: the Python package `ashlar` carries it as
`ashlar/jars/bioformats_package.jar`; give its path as BIOFORMATS_JAR.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.made_results import Made, make, steps
from wsi_gradcam.export import export
from wsi_gradcam.results.run import open_result


def java(tool: str, *arguments: str | Path) -> str:
    """What a tool of Bio-Formats prints."""
    jar = os.environ.get("BIOFORMATS_JAR")
    if not jar or shutil.which("java") is None:
        pytest.skip("needs java, and BIOFORMATS_JAR")
    command = ["java", "-Xmx1g", "-cp", jar, f"loci.formats.tools.{tool}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_bio_formats_finds_the_ome_xml_of_ome_zarr_valid(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"a.svs": Made((1500, 1300), steps((94, 82)))})
    (done,) = export(out, "ome-zarr-0.4", tmp_path)
    assert "No validation errors found" in java("XMLValidate", done.paths[0] / "OME" / "METADATA.ome.xml")


@pytest.mark.slow
def test_bio_formats_reads_the_ome_tiff(tmp_path: Path) -> None:
    made = Made((14_000, 17_003), steps((875, 1063)))
    out = make(tmp_path / "out", {"a.svs": made})
    (done,) = export(out, "ome-tiff", tmp_path)
    (path,), slide = done.paths, open_result(out)["a.svs"]
    told = java("ImageInfo", "-no-upgrade", "-nopix", "-noflat", "-omexml", path)
    assert "No validation errors found" in told
    assert "Checking file format [OME-TIFF]" in told
    lines = [line.strip() for line in told.splitlines()]
    assert f"Resolutions = {len(slide.levels)}" in lines
    for level, (_, width) in enumerate(slide.levels):
        assert f"sizeX[{level}] = {width}" in lines
    assert "SizeC = 4" in lines
    assert 'PhysicalSizeX="4.8"' in told
    assert 'Name="gradcam: tumour"' in told
    for level in range(len(slide.levels)):
        copy = tmp_path / f"copy-{level}.tiff"
        java("ImageConverter", "-no-upgrade", "-series", str(level), path, copy)
        np.testing.assert_array_equal(tifffile.imread(copy, series=0)[0], slide.heatmap("tumour", level).values)
