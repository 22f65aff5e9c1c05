"""The model behind LitServe, with its batching. Arguments: port, px, model."""

import sys

import litserve
from onnx_images import Network

PORT, SIZE_PX, MODEL = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


class Classifier(litserve.LitAPI):
    """One image a request; the framework makes batches of them."""

    def setup(self, device):
        self.network = Network(MODEL, SIZE_PX)

    def decode_request(self, request):
        return self.network.decode(request["file"].file.read())

    def batch(self, inputs):
        return inputs

    def predict(self, batch):
        return self.network.run(batch)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Classifier(max_batch_size=32, batch_timeout=0.004), accelerator="cpu")
    server.run(host="127.0.0.1", port=PORT, log_level="error", generate_client_file=False)
