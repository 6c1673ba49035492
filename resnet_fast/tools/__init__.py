"""What commands do with nets: list, load, count, ask and export them."""
