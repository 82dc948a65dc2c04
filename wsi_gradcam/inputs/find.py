"""Slides with unique ids from the files, folders, patterns, lists and URLs that users name."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from wsi_gradcam.errors import ConfigError, SlideNotFoundError, as_text, canonical, did_you_mean
from wsi_gradcam.inputs.lists import ENDINGS, NO_DETAILS, Details, Mpp, is_list, read_list
from wsi_gradcam.inputs.search import (
    ANY_FOLDERS,
    APPLE_DOUBLE,
    HEATMAP,
    RESULT,
    TIFFS,
    ZARR,
    Remarks,
    check_no_result,
    ending_of,
    find_in_folder,
    has_wildcard,
    is_image,
    is_passed_over,
    is_slide_result,
    matches,
    parts_of_pattern,
    result_error,
    split_pattern,
    zarr_kind,
)
from wsi_gradcam.io.urls import as_listed, host_of_url, is_url, redact_url, url_name, url_parts
from wsi_gradcam.slides import SUFFIXES, UNREAD, is_zarr

# Tag (0020,000E), little endian, with its type (DICOM PS3.5 section 7.1.2); it stands before any pixels.
SERIES_INSTANCE_UID = b"\x20\x00\x0e\x00UI"
HEAD_BYTES = 1 << 16
REQUESTS = 16  # at once
PICTURES = (".png", ".jpg", ".jpeg")
MAX_NEIGHBOURS = 10_000  # files of a folder that a misspelt name is compared with


@dataclass(frozen=True, slots=True)
class SlideEntry:
    """A slide of a run.

    Attributes:
        id: its path relative to the given folder, with forward slashes, as `as_text` writes it.
        path: its path, or its URL without secrets.
        mpp: (y, x) micrometres per level-0 pixel from a list, for a file that does not state it.
        url: the URL as it was given, if it has more than `path` shows. It must not be printed.
        mask: path of its mask from a list, which takes precedence over the run's.
        label, site, scanner, patient: details from a list, which do not change results.
    """

    id: str
    path: str
    mpp: Mpp = None
    url: str = field(default="", repr=False)
    mask: str = ""
    label: str = field(default="", compare=False)
    site: str = field(default="", compare=False)
    scanner: str = field(default="", compare=False)
    patient: str = field(default="", compare=False)

    @property
    def address(self) -> str:
        """The path or full URL to open."""
        return self.url or self.path


@dataclass(frozen=True, slots=True)
class _Found:
    """A slide before it has its id: path, name, details by a list, and full URL."""

    path: str
    name: str
    details: Details
    url: str = ""

    def entry(self, slide_id: str) -> SlideEntry:
        more = self.details
        told = (more.mask, more.label, more.site, more.scanner, more.patient)
        return SlideEntry(slide_id, self.path, more.mpp, self.url, *told)


@dataclass(frozen=True)
class Searched:
    """The slides that were found, and a line for each kind of file that was left out."""

    entries: list[SlideEntry]
    remarks: tuple[str, ...]


def find_slides(paths: Sequence[str | os.PathLike[str]]) -> list[SlideEntry]:
    """Return the slides that `search_slides` finds."""
    return search_slides(paths).entries


def search_slides(paths: Sequence[str | os.PathLike[str]], named: str = "") -> Searched:
    """Return the slides in `paths` (files, folders to search, patterns, URLs, lists), sorted by id, each once.

    A list is a CSV or Parquet file with a column `slide`, paths relative to the list's own folder, and optional
    columns, see `inputs.lists`; the last details of a slide count. A pattern has wildcards (`archive/**/*.svs`) and is
    not an existing name; its matches must have an ending of slides, unless the pattern has its own. A URL that ends in
    a slash is a folder, unless it is a Zarr image.

    A file's id is its name; slides of a folder are named from the folder, those of a pattern from the folder before its
    first wildcard; where that would give two slides one id, all are named from the folder that holds everything given.
    Results of wsi_gradcam are not slides: a search leaves them out, and naming one is an error.

    Buckets that occur only in a list are accessed without the user's credentials; those of `paths`, and of the URL
    `named`, with them.

    Raises:
        SlideNotFoundError: a path that does not exist.
        SlideAccessError: a URL of a folder that cannot be listed.
        ConfigError: nothing given, a folder without slides, a pattern that matches none, an invalid list, or a result.
    """
    if not paths:
        endings = ", ".join(ENDINGS)
        raise ConfigError(f"no slide given; expected slide files, folders, patterns, URLs, or lists ({endings})")
    found: dict[object, _Found] = {}
    remarks = Remarks()
    texts = [os.fspath(path) for path in paths]
    buckets = {host_of_url(text) for text in (*texts, named) if is_url(text)}
    for text in texts:
        for key, slide in _remote(text, remarks) if is_url(text) else _local(Path(text), remarks, buckets):
            known = found.setdefault(key, slide)
            if known is not slide and slide.details is not NO_DETAILS:
                found[key] = replace(known, details=known.details.updated(slide.details))
    return Searched(_entries(list(found.values())), tuple(remarks.lines()))


def _entries(slides: list[_Found]) -> list[SlideEntry]:
    """Return the slides with their ids, sorted by them."""
    names = [as_text(slide.name) for slide in slides]
    if len(set(names)) < len(names):
        places = [path_parts(slide.path) for slide in slides]
        shared = len(_common_folders([place[:-1] for place in places]))
        names = [as_text("/".join(place[shared:])) for place in places]
    ids = set(names)
    if len(ids) < len(names):
        raise ConfigError("several URLs differ only in dots and slashes; give each slide once")
    for name in ids:
        if inner := next((folder for folder in folders_of(name) if folder in ids), None):
            raise ConfigError(f"slides {inner} and {name} would share a folder in --out; explain them in separate runs")
    entries = [slide.entry(name) for name, slide in zip(names, slides, strict=True)]
    return sorted(entries, key=lambda entry: entry.id)


def choose_slides(entries: Sequence[SlideEntry], only: Sequence[str], skip: Sequence[str]) -> list[SlideEntry]:
    """Return the slides whose ids match a pattern of `only`, if there are any, and none of `skip`; see `matches`.

    Raises:
        ConfigError: a pattern that matches no slide, or nothing is left.
    """
    if not only and not skip:
        return list(entries)
    ids = [entry.id for entry in entries]
    wanted, unwanted = (
        set(chain.from_iterable(_matching_ids(ids, flag, pattern) for pattern in patterns))
        for flag, patterns in (("only", only), ("skip", skip))
    )
    chosen = [entry for entry in entries if (not only or entry.id in wanted) and entry.id not in unwanted]
    if not chosen:
        raise ConfigError(f"none of {len(entries)} slides is left: --skip excludes all that were selected")
    return chosen


def _matching_ids(ids: Sequence[str], flag: str, pattern: str) -> list[str]:
    parts = parts_of_pattern(canonical(as_text(pattern)))
    found = [name for name in ids if parts and matches(canonical(name).split("/"), parts)]
    if not found:
        raise ConfigError(
            f"--{flag} {pattern!r} matches no slide; expected a pattern of ids such as {ids[0]!r}, where * stays "
            "within one folder and ** crosses folders"
        )
    return found


def path_parts(path: str) -> tuple[str, ...]:
    """Return the parts of a slide's path, from the disk's root or the URL's host on, as they can name folders."""
    if is_url(path):
        return url_parts(path)
    return Path(path).relative_to(Path(path).anchor).parts


def folders_of(slide_id: str) -> Iterator[str]:
    """Yield the folders that contain an id, the innermost first.

    >>> list(folders_of("x/y/a.svs"))
    ['x/y', 'x']
    """
    while folder := slide_id.rpartition("/")[0]:
        yield folder
        slide_id = folder


def _common_folders(places: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the folders that all paths have in common, from the first on."""
    first, last = min(places), max(places)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _local(path: Path, remarks: Remarks, buckets: Collection[str]) -> Iterator[tuple[object, _Found]]:
    try:
        for place, name, details in _named(path, remarks):
            if is_url(place):
                yield _slide_at(as_listed(place, buckets), name, details)
            else:
                yield _slide_key(place), _Found(place, name, details)
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename or path}: cannot be read: {error.strerror}; grant read permission, or give other slides"
        ) from error


def _remote(url: str, remarks: Remarks) -> Iterator[tuple[object, _Found]]:
    """Yield the slide at a URL, or those in a remote folder."""
    if not url.endswith("/") or any(part.endswith(ZARR) for part in url_parts(url)[1:]):
        _check_no_remote_result(url)
        yield _slide_at(url, _image_name(*url_parts(url)[-2:]), NO_DETAILS)
        return
    from wsi_gradcam.slides.remote import is_remote_zarr

    if is_remote_zarr(url):
        yield _slide_at(url, url_name(url), NO_DETAILS)
        return
    found = Remarks()
    urls = _slides_below(url, "", found)
    if not urls:
        raise _no_slides(redact_url(url), "names", found)
    remarks.add(found)
    root = len(url_parts(url))
    yield from (_slide_at(each, "/".join(url_parts(each)[root:]), NO_DETAILS) for each in urls)


def _check_no_remote_result(url: str) -> None:
    """Raise a ConfigError for an exported TIFF at a URL; heatmaps say what they are when they are opened."""
    if ending_of(url_name(url)) in TIFFS:
        from wsi_gradcam.slides.remote import remote_texts
        from wsi_gradcam.slides.tiff_metadata import is_export

        if is_export(remote_texts(url)):
            raise result_error(redact_url(url), "an export")


def _slide_at(url: str, name: str, details: Details) -> tuple[object, _Found]:
    shown = redact_url(url)
    return shown, _Found(shown, name, details, "" if shown == url else url)


def _no_slides(place: object, what: str, found: Remarks) -> ConfigError:
    endings = " ".join(sorted(SUFFIXES))
    more = "".join(f"; {line}" for line in found.lines())
    pictures = _pictures_in(place) if isinstance(place, Path) else []
    mend = f"pictures must be named, as in '{place}/*{pictures[0]}'" if pictures else "give the folder with the slides"
    return ConfigError(f"{place}: no slides in this folder; expected {what} ending in {endings}{more}; {mend}")


def _pictures_in(folder: Path) -> list[str]:
    """Return the endings of the PNG and JPEG files in a folder; a search leaves them out, as many show no tissue."""
    return sorted({path.suffix for path in folder.iterdir() if path.suffix.lower() in PICTURES})


def _slides_below(url: str, below: str, remarks: Remarks) -> list[str]:
    """Return the URLs of the slides in a remote folder, as `find_in_folder` finds them in a local one."""
    from wsi_gradcam.slides.remote import list_folder, read_in_folder

    folders, files = list_folder(url)
    names = {url_name(each): each for each in (*folders, *files)}
    if is_slide_result(names.keys()):
        remarks.results.append(below.rstrip("/") or redact_url(url))
        return []
    slides = _slides_among(files, below, remarks)
    for folder in folders:
        name = url_name(folder)
        if name.endswith(ZARR):
            kind = zarr_kind(partial(read_in_folder, folder))
            if ours := kind == RESULT or name == HEATMAP:
                remarks.results.append(below + name)
            slides += [folder.rstrip("/")] * (not ours and not name.startswith(APPLE_DOUBLE) and is_image(name, kind))
        elif is_passed_over(name, (), (ANY_FOLDERS,)):
            remarks.folders.append(below + name)
        else:
            slides += _slides_below(folder, f"{below}{name}/", remarks)
    return sorted(slides)


def _slides_among(files: Sequence[str], below: str, remarks: Remarks) -> list[str]:
    """Return the URLs of files that are slides; of TIFFs the heads are read."""
    from wsi_gradcam.slides.remote import remote_texts
    from wsi_gradcam.slides.tiff_metadata import is_export

    own = [file for file in files if not url_name(file).startswith(APPLE_DOUBLE)]
    remarks.unread += [below + url_name(file) for file in own if ending_of(file) in UNREAD]
    slides = [file for file in own if ending_of(file) in SUFFIXES]
    tiffs = [file for file in slides if ending_of(file) in TIFFS]
    with ThreadPoolExecutor(REQUESTS) as pool:
        ours = {file for file, texts in zip(tiffs, pool.map(remote_texts, tiffs), strict=True) if is_export(texts)}
    remarks.results += [below + url_name(file) for file in tiffs if file in ours]
    return [file for file in slides if file not in ours]


def _named(path: Path, remarks: Remarks) -> Iterator[tuple[str, str, Details]]:
    """Yield path (with its folders resolved) or URL, name and details of the slides that a path names."""
    if not path.exists():
        yield from _matching(path, remarks)
    elif is_list(path):
        yield from _listed(path)
    elif path.is_dir() and not is_zarr(path):
        empty, found = True, Remarks()
        for place, name in find_in_folder(path, remarks=found):
            empty = False
            yield place, name, NO_DETAILS
        if empty:
            raise _no_slides(path, "files", found)
        remarks.add(found)
    else:
        # The folder resolved and the name as given: a link is a slide of its own, `a/../a` is not.
        itself = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
        check_no_result(str(itself))
        yield str(itself), _image_name(itself.parent.name, itself.name), NO_DETAILS


def _image_name(folder: str, name: str) -> str:
    """Return the name of a slide; of one image in a Zarr of several, whose own name is a number, with the folder's."""
    return f"{folder}/{name}" if folder.endswith(ZARR) else name


def _listed(path: Path) -> Iterator[tuple[str, str, Details]]:
    """Yield as `_named` for a list.

    Raises:
        ConfigError: it is none, or names a result.
    """
    for place, name, details in read_list(path):
        if not is_url(place):
            check_no_result(place, f"{path}: ")
        yield place, name, details


def _matching(path: Path, remarks: Remarks) -> Iterator[tuple[str, str, Details]]:
    """Yield as `_named` for a pattern; the lists among its matches are read."""
    root, pattern = split_pattern(Path(os.path.expanduser(path)))  # noqa: PTH111 - pathlib's own raises for unknown users
    if not pattern or not root.is_dir():
        where = path if not pattern else root
        mend = _neighbours(Path(where)) or "check the path"
        raise SlideNotFoundError(f"{where}: does not exist, expected a slide file or a folder; {mend}")
    ending = Path(pattern[-1]).suffix.lower()
    endings = SUFFIXES if not ending or has_wildcard(ending) else SUFFIXES | {ending}
    empty, found = True, Remarks()
    for place, name in find_in_folder(root, endings, pattern, found):
        empty = False
        if place.lower().endswith(ENDINGS) and is_list(Path(place)):
            yield from _listed(Path(place))
        else:
            yield place, name, NO_DETAILS
    if empty:
        more = "".join(f"; {line}" for line in found.lines())
        raise ConfigError(
            f"{path}: no slide in {root} matches this pattern; expected a pattern such as 'archive/**/*.svs'{more}"
        )
    remarks.add(found)


def _neighbours(path: Path) -> str:
    """Return a question with names next to a missing file that are similar to its own; "" if there are none."""
    try:
        with os.scandir(path.parent) as entries:
            return did_you_mean(path.name, [as_text(entry.name) for entry in islice(entries, MAX_NEIGHBOURS)], 0.8)
    except OSError:
        return ""


def _slide_key(file: str) -> str | Path:
    """Return a key that the files of one slide share: for DICOM, folder and series; else the file itself."""
    return _series_of(Path(file)) if file.lower().endswith(".dcm") else file


def _series_of(file: Path) -> Path:
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:  # it will fail as a slide, with this cause
        return file
    start = head.find(SERIES_INSTANCE_UID) + len(SERIES_INSTANCE_UID)
    if start < len(SERIES_INSTANCE_UID):
        return file.parent
    length = int.from_bytes(head[start : start + 2], "little")
    return file.parent / head[start + 2 : start + 2 + length].hex()
