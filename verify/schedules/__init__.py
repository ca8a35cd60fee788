"""Pipeline schedules: tables read from targets, their laws, and pictures of them."""
