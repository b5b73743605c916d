"""The export engine optimum: a subprocess over an overlay of the packages that it needs in other versions."""
