"""The claims of the five notes, a folder a note; each file defines CLAIM, or CLAIMS for one measurement that settles several."""
