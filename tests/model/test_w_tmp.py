import pytest
pytestmark=pytest.mark.amici
def test_a(trained, native): 
    print(native.get_predictions(prog_bar=False).shape)
def test_b(adata, trained, native):
    import amici_eval
    m=trained.bind(adata); m.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
