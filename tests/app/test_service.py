"""What the service sets for the whole process."""

from PIL import Image

from app.service import Service
from app.settings import Settings


def test_pillow_itself_refuses_pictures_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    service = Service(Settings(max_pixels=10_000, cores=1))
    service.close()
    assert Image.MAX_IMAGE_PIXELS == 5_000, "it refuses more than twice as many"
