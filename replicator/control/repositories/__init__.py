"""What stands in the tables, a module for each aggregate. Functions take the transaction they are part of."""
