"""How the models of each family become a `limbeck.export.graph.decoder.Decoder`."""
