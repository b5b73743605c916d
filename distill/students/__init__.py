"""One student: how it begins, its key and folder, its controls, its model card and licences."""
