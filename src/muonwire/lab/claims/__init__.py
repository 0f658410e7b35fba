"""One file a claim, or one a table that several claims share; each defines CLAIM, or CLAIMS."""
