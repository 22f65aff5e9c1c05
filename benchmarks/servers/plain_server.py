"""What a tutorial teaches: FastAPI, Pillow, torchvision's transforms and eager torch. Arguments: port, px, network."""

import io
import sys

import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision import models, transforms

PORT, SIZE_PX = int(sys.argv[1]), int(sys.argv[2])

app = FastAPI()
network = models.get_model(sys.argv[3], num_classes=2).eval()
transform = transforms.Compose(
    [
        transforms.Resize((SIZE_PX, SIZE_PX)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


@app.post("/predict")
def predict(file: UploadFile) -> dict[str, object]:
    """Answer for one image."""
    image = Image.open(io.BytesIO(file.file.read())).convert("RGB")
    with torch.no_grad():
        probabilities = torch.softmax(network(transform(image).unsqueeze(0)), 1)[0]
    return {"prediction": int(probabilities.argmax()), "probabilities": probabilities.tolist()}


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="error", access_log=False)
