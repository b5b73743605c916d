"""The quickstart: the whole loop without downloads, with its recipe, policy and teacher."""
