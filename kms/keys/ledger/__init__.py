"""What a use costs and how its request can be repeated: values and rules, without SQL."""
