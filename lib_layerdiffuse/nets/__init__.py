"""The networks in pure torch. Attribute names are the keys of the released files; sizes come from the state dict."""
