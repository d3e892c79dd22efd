"""The page that a run leaves to look at: what is read of it, the plots, the HTML around them."""
