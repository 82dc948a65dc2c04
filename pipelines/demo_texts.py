"""The words of the model cards around their figures."""

from collections.abc import Sequence

from demo_card import Result, Spec, map_table, model_section, patch_section
from demo_training import Recipe
from wsi_gradcam.demo.run import DAB_SIGMA_PX, DAB_THRESHOLD
from wsi_gradcam.models.zoo.nets import PatchCNN

MAPS = """\
Each patch's probability is painted over its footprint, and its raw signed Grad-CAM is enlarged to it
(bilinear, no per-patch scaling); patches that overlap are averaged. ROC AUC is over 16 px cells against the
majority of the mask. "True share" paints the mask's own share over each patch: as fine as patches allow
without overlap."""


def oral_card(
    spec: Spec,
    model: PatchCNN,
    recipe: Recipe,
    results: Sequence[Result],
    names: tuple[Sequence[str], Sequence[str]],
    match: float,
    glass: float,
) -> str:
    """Return the card of oral-tumour.

    Args:
        names: of the crops that it was trained on, and of those held out.
        match: the largest correlation of two crops.
        glass: the highest probability of bare glass.
    """
    return f"""\
# oral-tumour

Tumour or other tissue in H&E of oral squamous cell carcinoma. Written by
`pipelines/train_demo.py oral-tumour`.

## Intended use

Demonstrating and testing `wsi_gradcam` on real tissue. **Not for diagnosis**, and not for any slide other than the
one it was trained on.

## Model

{model_section(spec, model, recipe)}

## Data and licence

Seven 640 px crops of one slide (1009009) with pixel masks of tumour, from the OCDC data set,
https://doi.org/10.17632/9bsc36jyrt (CC BY 4.0), through the public repositories
sarah-antillia/ImageMask-Dataset-OCDC and sarah-antillia/Tensorflow-Image-Segmentation-OCDC (Apache-2.0).
The weights are released under CC BY 4.0, with attribution to the authors of the data set. Masks are JPEG and
are thresholded at half of 255. 0.5 mpp is assumed.

- Trained on: {", ".join(names[0])}.
- Held out: {", ".join(names[1])}. `wsi-gradcam demo` shows these.

The oral-cancer tiles of atlan-antillia/EfficientNet-Histopathologic-Oral-Cancer were considered and left out: they have
one label per tile and no masks, at two other magnifications, and among 1,224 files, 14 groups are
byte-identical under both labels and 2 in both splits.

## Held-out figures

Split by crop. The weights provided are the ones evaluated: they never saw a pixel of the held-out crops. The
figures are still slightly flattering: all crops are of one slide, and patch size, network, loss and training time
were chosen beforehand, by cross-validation over all seven. No two crops share tissue: the highest phase
correlation of two under shifts, rotations and reflections is {match:.3f}; a copy gives 1, and crops
that share a quarter give 0.17.

### Maps

{MAPS}

{map_table(results)}

### Patches

A patch is tumour if more than half of its pixels are. "Colour alone" is a logistic regression on the mean and
standard deviation of R, G, B, trained and evaluated on the same split.

{patch_section(results)}

Bare glass, flat from 225 to 255: highest probability of tumour {glass:.3f}.

## Limits

- One slide, one patient, one laboratory, one scanner: any other stain or organ is outside what it knows, and
  nothing here measures that. Calibration holds within the slide at best.
- Every crop that it was trained on contains tumour; the negative class is the keratin, inflammation, stroma and
  glass beside it. Normal epithelium, muscle, glands and fat were never seen.
- Without overlap the probability map is as blocky as its {spec.patch_px} px patches: see "true share"
  above. Patches that overlap make it finer.
- Cells were trained with the mask, so Grad-CAM follows edges better than the probability does. It shows how the
  score is made up; it is not independent evidence.
"""


def ihc_card(spec: Spec, model: PatchCNN, recipe: Recipe, result: Result, glass: float) -> str:
    """The card of ihc-dab; ``glass``: the highest probability of bare glass."""
    return f"""\
# ihc-dab

DAB-positive or negative tissue in an immunohistochemistry micrograph. Written by
`pipelines/train_demo.py ihc-dab`.

## Intended use

The model of `wsi-gradcam demo`: small, quick, and about something anyone can check by eye. **Not for scoring
stains**: colour deconvolution, which provided the ground truth, does that without a CNN.

## Model

{model_section(spec, model, recipe)}

## Data and licence

`skimage.data.immunohistochemistry()`: one 512 px micrograph of colonic glands, FHL2 in DAB, haematoxylin
counterstain, from the Center for Microscopy and Molecular Imaging; no known copyright restrictions. The
weights are released under CC0 1.0. The pixel size is not recorded; 0.5 mpp is assumed.

The ground truth is computed, not annotated: the DAB channel of `skimage.color.rgb2hed`, smoothed by
{DAB_SIGMA_PX:g} px so that unstained nuclei belong to their stained cells, above {DAB_THRESHOLD:g}, the valley between
the two modes of its histogram.

## Held-out figures

Split by quadrant: the bottom right one (256 px) is painted white before training and used only for evaluation.
The weights provided are the ones evaluated. The quadrant is a small gland in stroma, from the same micrograph and
stain, and two glands cross its edge: an easy test.

### Maps

{MAPS}

{map_table([result])}

### Patches

A patch is positive if more than half of its pixels are. "Colour alone" is a logistic regression on the mean and
standard deviation of R, G, B, trained on the other quadrants; the label itself is a matter of
colour.

{patch_section([result])}

Bare glass, flat from 225 to 255: highest probability of positive {glass:.3f}.

## Limits

- One micrograph: other antibodies, stains, scanners, nuclear or membranous patterns were never seen.
- Brown that is not DAB (pigment, folds, ink) is taken for positive.
- {result.apart.truth.size} cells and {result.overlapping.patch_share.size} overlapping patches are few, and
  neighbours are alike: the figures have wide error margins, which are not given.
"""
