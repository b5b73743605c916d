"""One student: its initial weights, key and folder, controls, training, model card and licences."""
