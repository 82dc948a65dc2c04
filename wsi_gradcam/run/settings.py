"""The settings of a run, from a YAML file, flags or Python; unknown keys and impossible values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from wsi_gradcam.cam.facts import NO_METHOD
from wsi_gradcam.errors import ConfigError, DocumentError, one_line, quoted
from wsi_gradcam.io.documents import MAX_BYTES, read_yaml
from wsi_gradcam.io.local import read_file
from wsi_gradcam.io.urls import is_url
from wsi_gradcam.system.confinement import Limits
from wsi_gradcam.system.processes import cores

# Settings that change only how fast or how patiently a result is reached, not the result. The path of the mask and the
# source of a slide's mpp are among them: what counts, slide by slide, are the mask's content, its frame and the mpp
# itself.
NOT_IN_IDENTITY = frozenset(
    {
        "reader_threads",
        "torch_threads",
        "max_unreadable",
        "mask",
        "mask_frame",
        "outlines",
        "allow_upsampling",
        "mpp",
        "replace_mpp",
        "trust_objective",
        "decode",  # only the choice counts
        "allow_hosts",
        "isolate",
        "isolate_memory",
        "isolate_seconds",
        "bag_method",  # for slide-level models, to whose plan they are added
        "bag_baseline",
        "feature_precision",
        # What counts for given features, slide by slide, are the places and the vectors.
        "features",
        "feature_patch_um",
        "feature_unit",
        "feature_axes",
        "feature_name",
    }
)


FEWEST_READERS, MOST_READERS = 2, 16

Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """The settings of a run. Each field is a flag of `wsi-gradcam explain` and a key of its --config file.

    The descriptions are also the help of the flags, where names in backticks become flags.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: Annotated[
        tuple[str, ...],
        Field(
            description="what to explain: a class by name or index, 'predicted', 'all', CLASS-CLASS (the difference of "
            "two) or module:function (default: all of up to 10 classes, else predicted)"
        ),
    ] = ()
    method: Annotated[
        tuple[str, ...],
        Field(
            description="explanation methods: gradcam, hirescam, ...; 'info --model' lists all; none: only how much "
            "each patch contributes to a slide-level model, without explaining its pixels"
        ),
    ] = ("gradcam",)
    bag_method: Annotated[
        tuple[str, ...],
        Field(
            description="how to measure the contribution of a patch to the slide's answer: integrated_gradients, "
            "gradient_x_input, lrp, one_removed, shapley; the first one given, which must be one of the first three "
            "here, is explained down to the pixel by `method`"
        ),
    ] = ("integrated_gradients",)
    feature_precision: Annotated[
        Literal["float32", "float16"], Field(description="precision of the stored features")
    ] = "float32"
    bag_baseline: Annotated[
        Literal["zero", "mean"],
        Field(
            description="the baseline of integrated_gradients: features of zero, or the mean over all patches of all "
            "slides of the command"
        ),
    ] = "zero"
    features: Annotated[
        Path | None,
        Field(
            description="folder of existing features: from TRIDENT, CLAM, STAMP, AtlasPatch or slide2vec "
            "(docs/slide_level.md)"
        ),
    ] = None
    feature_patch_um: Annotated[
        PositiveFloat | None,
        Field(description="side of a patch in micrometres, if `features` do not state it or are wrong"),
    ] = None
    feature_unit: Annotated[
        Literal["px", "um"] | None,
        Field(description="unit of the coordinates, if `features` do not state it: level-0 pixels or micrometres"),
    ] = None
    feature_axes: Annotated[
        Literal["xy", "yx"] | None, Field(description="order of the coordinates, if those of `features` may be swapped")
    ] = None
    feature_name: Annotated[str | None, Field(description="which features to use of files with several")] = None
    layer: Annotated[
        str | None,
        Field(
            description="module whose output is explained, or A+B to average the maps of two (default: the model "
            "file's, or else detected)"
        ),
    ] = None
    mpp: Annotated[
        tuple[float, float] | None,
        Field(
            description="micrometres per level-0 pixel for slides that do not state it: a number, or Y,X; the value in "
            "a list of slides takes precedence"
        ),
    ] = None
    replace_mpp: Annotated[
        bool, Field(description="use `mpp`, or the mpp in a list, even for slides that state another")
    ] = False
    patch_mpp: Annotated[
        PositiveFloat | None,
        Field(description="micrometres per pixel of the model's input (default: the model file's)"),
    ] = None
    patch_px: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(description="side of the model's input in pixels, or HEIGHT,WIDTH (default: the model file's)"),
    ] = None
    overlap: Annotated[
        float,
        Field(ge=0, lt=1, description="share of a patch that its neighbour also covers along each axis, 0 to below 1"),
    ] = 0.0
    stride_px: Annotated[
        PositiveInt | None, Field(description="instead of `overlap`: patch pixels from one patch to the next")
    ] = None
    min_tissue: Annotated[Share, Field(description="leave out patches with a smaller share of tissue")] = 0.1
    tissue: Annotated[
        Literal["auto", "with-pen", "everything"],
        Field(
            description="what counts as tissue: auto leaves out glass, ink and shadows; with-pen keeps what looks like "
            "ink, for stains such as trichrome and Alcian blue; everything is the whole slide"
        ),
    ] = "auto"
    mask: Annotated[
        Path | None,
        Field(
            description="regions to explain: a PNG (all that is not black), GeoJSON, ASAP or ImageScope file for the "
            "whole slide, or a folder with one file per slide; `tissue` still applies"
        ),
    ] = None
    include: Annotated[
        tuple[str, ...],
        Field(description="annotation classes of `mask` to explain (default: all that are not excluded)"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Field(description="annotation classes of `mask` to leave out, even where they overlap others")
    ] = ()
    mask_frame: Annotated[
        Literal["auto", "slide", "bounds"],
        Field(
            description="what `mask` was drawn on: the whole slide, or the scanned part of a Leica, MIRAX or Ventana "
            "slide, as shown in QuPath; auto: whichever places it on tissue, refused if both do"
        ),
    ] = "auto"
    outlines: Annotated[
        Path | None,
        Field(
            description="annotations whose outlines are drawn on overview.png, in the formats of `mask`; they affect "
            "nothing else"
        ),
    ] = None
    allow_upsampling: Annotated[
        bool, Field(description="explain slides even if they must be enlarged more than 4 times for the model")
    ] = False
    heatmap_stride: Annotated[PositiveInt, Field(description="level-0 pixels per heatmap pixel, a power of two")] = 16
    window: Annotated[Literal["hann", "uniform"], Field(description="how overlapping patches are weighted")] = "hann"
    batch_size: Annotated[
        PositiveInt | Literal["auto"],
        Field(description="patches per forward pass, or auto: as many as increase speed and fit into memory"),
    ] = 32
    span_patches: Annotated[PositiveInt, Field(description="patches per unit of work, a multiple of `batch_size`")] = (
        256
    )
    device: Annotated[str, Field(description="where the model runs: cpu, cuda, cuda:1, mps")] = "cpu"
    engine: Annotated[
        Literal["auto", "eager", "compile", "cudagraphs", "openvino"],
        Field(description="what runs the network up to the layer; auto: the fastest, see `precision`"),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "tf32", "bfloat16", "float16"],
        Field(
            description="precision of the network up to the layer, tf32 only on GPUs; auto: the fastest that preserves "
            "the maps, chosen on the first patches and used for the whole run"
        ),
    ] = "auto"
    reader: Annotated[
        str,
        Field(
            description="what reads slides: openslide, tiff, ... (docs/slides.md lists all); auto: the fastest that "
            "reads a file correctly"
        ),
    ] = "auto"
    channels: Annotated[
        tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None,
        Field(
            description="channels to use as red, green and blue for slides with grey channels (fluorescence), counted "
            "from 0: 2,1,0; such slides are refused without it, and slides in colour are not affected"
        ),
    ] = None
    decode: Annotated[
        Literal["exact", "scaled", "auto"],
        Field(
            description="scaled: reduce JPEG and JPEG 2000 tiles while they are decoded, where patches are coarser "
            "than a level: faster, but a few grey levels off; auto: scaled if the maps of the first patches stay the "
            "same"
        ),
    ] = "exact"
    trust_objective: Annotated[
        bool, Field(description="derive the mpp of slides that do not state it from the objective's power (40x: 0.25)")
    ] = False
    reader_threads: Annotated[
        PositiveInt | None,
        Field(
            description="threads that read patches while the model works (default: 2; for a GPU, one fewer than there "
            "are cores, 2 to 16)"
        ),
    ] = None
    torch_threads: Annotated[
        PositiveInt | None, Field(description="threads of the model on a CPU (default: all, shared between workers)")
    ] = None
    isolate: Annotated[
        bool,
        Field(
            description="for files from untrusted sources: read each slide in a process of its own without network or "
            "write access; if it needs too much, only its slide fails (Linux; costs 0.2 to 1 ms per patch)"
        ),
    ] = False
    isolate_memory: Annotated[
        PositiveInt, Field(description="with `isolate`: MiB of memory allowed for reading a slide")
    ] = 2048
    isolate_seconds: Annotated[
        PositiveFloat, Field(description="with `isolate`: seconds allowed for opening a slide or reading a region")
    ] = 60.0
    max_unreadable: Annotated[Share, Field(description="share of unreadable patches above which a slide fails")] = 0.01

    allow_hosts: Annotated[
        tuple[str, ...],
        Field(
            exclude=True,  # a permission, which no file of results can give
            description="contact only these hosts and buckets for slides: '*.example.org', 's3://bucket' (default: "
            "all but cloud metadata services); your credentials are used for buckets of a list only if "
            "they are named here",
        ),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if not isinstance(values.get("layer"), str | None):
            raise ValueError(
                f"layer is {quoted(values['layer'])}, expected the name of a module, such as layer4; GradCAM and "
                "model_of accept modules"
            )
        for key in ("mpp", "patch_px"):
            if isinstance(values.get(key), int | float):
                values[key] = (values[key], values[key])
        for key in ("target", "include", "exclude", "allow_hosts"):
            if isinstance(values.get(key), str | int):
                values[key] = (values[key],)
            if isinstance(values.get(key), list | tuple):
                values[key] = tuple(str(v) for v in values[key])
        if isinstance(values.get("features"), str) and is_url(values["features"]):
            raise ValueError(
                f"features is {quoted(values['features'])}; features are read only from a local disk; copy them there"
            )
        for key in ("mask", "outlines", "features"):
            if isinstance(values.get(key), str | Path):
                values[key] = Path(values[key]).absolute()  # workers may run in another folder
        for key in ("method", "bag_method"):
            if isinstance(values.get(key), str):
                values[key] = tuple(name.strip() for name in values[key].split(","))
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heatmap_stride < 2 or self.heatmap_stride & (self.heatmap_stride - 1):
            raise ValueError(f"heatmap_stride is {self.heatmap_stride}, expected a power of two such as 16")
        if self.overlap and self.stride_px is not None:
            raise ValueError("overlap and stride_px set the same thing; give only one")
        for key, names in (("method", self.method), ("bag_method", self.bag_method)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{key} is {', '.join(names) or 'empty'}, expected different names")
        if isinstance(self.batch_size, int) and self.span_patches % self.batch_size:
            raise ValueError(
                f"span_patches is {self.span_patches}, expected a multiple of batch_size {self.batch_size}, "
                "so that batches are cut the same way everywhere"
            )
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods by which patches are explained down to pixels; () if there is none."""
        return () if self.method == (NO_METHOD,) else self.method

    def stride(self, patch_px: tuple[int, int]) -> tuple[int, int]:
        """Return (y, x) patch pixels from one patch to the next.

        >>> Settings(overlap=0.5).stride((224, 224))
        (112, 112)
        """
        if self.stride_px is not None:
            return self.stride_px, self.stride_px
        height, width = (max(1, round(size * (1 - self.overlap))) for size in patch_px)
        return height, width

    @property
    def readers(self) -> int:
        """The number of threads that read patches, in this process or a similar one."""
        if self.reader_threads is not None:
            return self.reader_threads
        return FEWEST_READERS if self.device == "cpu" else min(MOST_READERS, max(FEWEST_READERS, cores() - 1))

    @property
    def isolation(self) -> Limits | None:
        """The limits of the processes that read slides; None if slides are read in the process's usual way."""
        return Limits(self.isolate_memory, self.isolate_seconds) if self.isolate else None

    def identity(self) -> dict[str, Any]:
        """Return the settings that results depend on; two runs that differ in them must not share an output."""
        without = {*NOT_IN_IDENTITY, *(() if self.channels else ("channels",))}  # older versions did not have it
        return self.model_dump(mode="json", exclude=without)


def make_settings(**values: Any) -> Settings:
    """Return settings from keyword arguments.

    Raises:
        ConfigError: an unknown key or an impossible value; the message is one line.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        from wsi_gradcam.models.spec import explain_validation  # takes time to import; flags must be available at once

        raise ConfigError(explain_validation(error, Settings.model_fields)) from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys and values of a --config file, not yet validated.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        values = read_yaml(read_file(path, MAX_BYTES))
    except DocumentError as error:
        raise ConfigError(f"{path}: not a YAML file that can be read: {one_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values such as 'overlap: 0.5'")
    return {str(key): value for key, value in values.items()}
