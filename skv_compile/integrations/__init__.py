"""How ``skv.compile`` meets the models of a library."""
