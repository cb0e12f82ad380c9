import { readSync } from 'node:fs';
import { SafetensorsFile } from '../../src/model/safetensors.js';

/** The tensors of a safetensors file, whole, by name. */
export function readTensors(path: string) {
  const file = new SafetensorsFile(path);
  const bytes = (name: string) => {
    const tensor = file.tensors.get(name);
    if (!tensor) throw new Error(`no tensor ${name} in ${path}`);
    const elements = tensor.shape.reduce((n, d) => n * d, 1);
    const out = new Uint8Array(elements * 4);
    readSync(file.fd, out, 0, out.length, tensor.offset);
    return { out, tensor };
  };
  return {
    shape: (name: string) => bytes(name).tensor.shape,
    float32: (name: string) => new Float32Array(bytes(name).out.buffer),
    int32: (name: string) => new Int32Array(bytes(name).out.buffer),
    close: () => file.close(),
  };
}
