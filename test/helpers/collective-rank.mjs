// One rank of a collective under test, in a process of its own. Does what the test says over the fork's channel.

import { join } from 'node:path';
import { localCollective } from '../../dist/comm/local.js';
import { ZmqCollective } from '../../dist/comm/zmq.js';

const [name, folder, rank, ranks] = process.argv.slice(2);
const endpoint = (from, to) => `ipc://${join(folder, `r${from}-r${to}`)}`;

async function open() {
  if (name === 'local') return localCollective();
  const zmq = await ZmqCollective.bind(+rank, +ranks, (partner) => endpoint(rank, partner));
  zmq.connect(
    Object.fromEntries(Array.from({ length: +ranks }, (_, other) => [other, endpoint(other, rank)])),
  );
  return zmq;
}

const collective = await open();

async function perform({ op, send, delayMs, limitMs }) {
  if (limitMs) collective.limit(limitMs);
  await new Promise((resolve) => setTimeout(resolve, delayMs));
  if (op === 'allReduce') {
    await collective.allReduce(send);
    return send;
  }
  const gathered = new Float32Array(send.length * ranks);
  await collective.gather(send, gathered);
  return gathered;
}

process.on('message', (order) => {
  perform(order).then(
    (result) => process.send({ result }),
    ({ code, text }) => process.send({ error: { code, text } }),
  );
});
process.on('disconnect', () => process.exit());
process.send('ready');
