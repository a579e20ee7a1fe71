"""The made world: scenes of coloured shapes with expressions, questions and masks; needs no download."""
