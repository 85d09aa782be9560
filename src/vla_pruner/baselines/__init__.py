"""The maths of other papers' methods: pure tensor functions that know no model."""
