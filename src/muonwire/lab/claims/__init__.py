"""The claims of the five notes, a folder a note; each file defines CLAIM, or CLAIMS for one measurement that settles several."""

# What somebody who trains wants to know first, in this order: the question, and the claim whose verdict answers it.
MATTER_MOST = {
    "Is it momentum or orthogonalizing that helps?": "hypothesis.2",
    "Where between gradient and weight to orthogonalize?": "integration.5",
    "Which of the six approaches?": "hypothesis.1",
    "Which matrices first?": "hypothesis.3",
    "How many bytes does compressing save?": "conflict.4",
    "The learning rate inside or outside the polar factor?": "vit.3",
    "Muon on a vision transformer?": "vit.7",
    "Which Newton–Schulz coefficients?": "coefficients.1",
    "In which precision?": "integration.6",
    "Orthogonalize the weights instead?": "topdown.1",
}
