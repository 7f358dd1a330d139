"""Documents beside the weights, for people: model card, loss plot, samples and resolved.yaml.

write         all of them, as artifacts like any other
model_card    README.md of the model, from the template model_card.md.jinja
public_settings the settings that the card shows, and sources as others may see them
course        time and speed of a run
judged_losses losses of the published weights on the same rows, as a table in the card
sample_table  answers during training, as a table in the card
event_file    the metrics for TensorBoard
loss_plot     the loss curves as an SVG
resolved      resolved.yaml: everything that determined the result
"""
