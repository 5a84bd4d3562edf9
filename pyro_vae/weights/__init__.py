"""The importance weight of a pair: particles drawn and scored."""
