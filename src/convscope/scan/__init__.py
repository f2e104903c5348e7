"""One pass over a data set: every unit's best pictures and statistics, in a store that can be asked."""
