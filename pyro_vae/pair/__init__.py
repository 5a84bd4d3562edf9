"""The pair: its two functions, its inputs, its sites, opened once and refused here."""
