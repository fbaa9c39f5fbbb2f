"""The rewriting of programs: a jaxpr evaluator that calls the mathematics of `lojax.lowrank`. No mathematics here."""
