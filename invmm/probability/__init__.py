"""How probably the model, used normally, returns an image: counted, split, and certified."""
