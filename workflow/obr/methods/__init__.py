"""One layer at a time: weights and Hessian in, pruned and quantised weights out."""
