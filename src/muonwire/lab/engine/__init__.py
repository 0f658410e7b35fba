"""What every claim needs: checks, verdicts, repeats that are kept, and the page."""
