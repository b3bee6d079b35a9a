"""How often the verdict is right: the whole protocol on planted pairs, whose truth is measured."""
