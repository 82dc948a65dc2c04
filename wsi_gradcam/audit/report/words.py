"""What the audit's report says in plain words: each question, how it is answered, what a pass does not prove."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_gradcam.cam.facts import METHOD_INFO


@dataclass(frozen=True)
class Question:
    """A question of the audit, for readers who are no statisticians.

    Attributes:
        title: as a heading.
        how: how it is answered.
        not_proven: what an answer that holds leaves open.
        source: papers.
    """

    title: str
    how: str
    not_proven: str
    source: str


WORDS: dict[str, Question] = {
    "faithfulness": Question(
        "Does the answer hang on what the map shows?",
        "Pixels are taken away in the order of the map, the hottest first (deletion), or given back in that order "
        "(insertion). If the map is right, the model's answer falls soon, or comes back soon. The same is done in "
        "the order of maps that know nothing of the model: noise, edges of the picture, the middle first, no order "
        "at all, and the probability of the patches round about. What counts is insertion less deletion, for an order "
        "that tears the picture apart lowers both curves. The map must beat every one of them.",
        "Pixels that were taken away leave pictures that no slide holds, so several ways to fill the gap stand "
        "beside each other. A map that is faithful to a bad model is still faithful.",
        "Petsiuk 2018 (arXiv 1806.07421); ROAD: Rong 2022 (arXiv 2202.00449)",
    ),
    "sanity": Question(
        "Does the map depend on what the model has learned?",
        "The model's weights are made random, and the map is made again. If it stays, it shows the picture and not the "
        "model. Each random network is joined by its opposite, so that what two networks share by chance is taken off. "
        "Guided backpropagation, which is known to draw edges whatever a model has learned, stands beside as the "
        "control that should fail. The model's answers are held against those of random copies, too: if they differ "
        "no more, it has learned nothing of such patches.",
        "It finds maps that ignore the model. It cannot say which of two methods that pass is better.",
        "Adebayo 2018 (arXiv 1810.03292); Hedström 2024 (arXiv 2401.06465); that it ranks nothing: Binder 2022 "
        "(arXiv 2211.12486)",
    ),
    "stability": Question(
        "Do answer and map survive what slides vary by?",
        "Each patch is changed a little: noise of a camera, another strength of its stains, JPEG compression, a "
        "shift of the grid of patches. The change of the map is held against the map of another patch, which is as "
        "far as a map can reasonably move; the change of the answer against noise that moves pixels as far.",
        "Other changes than these, such as another laboratory's staining, may do more.",
        "Yeh 2019 (arXiv 1901.09392); Tellez 2018 (doi 10.1109/TMI.2018.2820199)",
    ),
    "locality": Question(
        "How far does the map's story carry?",
        "A gradient tells of an infinitely small change. Here what the map shows is really made weaker and stronger, "
        "step by step, and the answer is held against what the gradient had promised. Where the two part, the map is "
        "right about the nearest step only: two models may have equal maps and do different things next.",
        "Only steps along the map are tried. A promise that is kept there may be broken elsewhere.",
        "Yeh 2019 (arXiv 1901.09392); Sundararajan 2017 (arXiv 1703.01365)",
    ),
    "saturation": Question(
        "Where is the gradient blind?",
        "Where a model is very sure, its probability hardly changes any more, and the gradient of the probability is "
        "nearly zero although the evidence is strongest there. The maps of this archive explain the logit, which "
        "does not saturate so. Units that are off pass no gradient either; a map whose backward pass leaks through "
        "them stands beside.",
        "A model without saturation may still be wrong.",
        "definitions: wsi_gradcam.audit.measures.saturation",
    ),
    "shortcuts": Question(
        "Does the answer hang on ink, glass, blur, folds or borders?",
        "Attribution on such a place is a correlation. Hiding it is an experiment: if the answer changes more than "
        "when as much is hidden elsewhere, the place is a cause of the answer.",
        "Only suspects that are detected or given (--regions) are tested, and detection misses some; folds and rulers "
        "are not detected. Shortcuts that look like tissue, "
        "such as a stain that goes with a hospital, are not among them: compare sites and scanners below.",
        "a masking intervention with equal-area controls, see wsi_gradcam.audit.measures.shortcuts",
    ),
    "plausibility": Question(
        "Does the map look where an annotation says?",
        "On patches through which the border of an annotation runs, the map is held against the annotated area.",
        "That a map looks right does not say that the model uses it: read it with the first question.",
        "pointing game: Zhang 2016 (arXiv 1608.00507); mass and rank: Arras 2022 (arXiv 2003.07258)",
    ),
}
OUTCOMES = {"holds": "✓ holds", "fails": "✗ fails", "unclear": "? unclear"}
STATES = {"holds": "good", "fails": "bad", "unclear": "open"}
HOW_TO_READ = (
    "Every number is an estimate from a sample of patches, with the range in which it would lie in 95 of 100 such "
    "samples. “Unclear” means that these patches do not tell; it is neither a pass nor a failure. Where slides are "
    "fewer than six, ranges are of these slides alone and say nothing of others."
)
NAMED = {
    "random": "noise (control)",
    "edges": "edges (control)",
    "constant": "no order (control)",
    "centre": "middle first (control)",
    "probability": "probability alone (control)",
}
NAMES_OF_CHANGES = {"jpeg": "JPEG"}


def named(of: str) -> str:
    """What a number is of, as people call it: methods by their titles, controls as such."""
    name, comma, rest = of.partition(", ")
    return f"{_named(name)}{comma}{_named(rest)}"


def _named(name: str) -> str:
    if name in METHOD_INFO:
        return METHOD_INFO[name].title
    return NAMED.get(name, NAMES_OF_CHANGES.get(name, name))
