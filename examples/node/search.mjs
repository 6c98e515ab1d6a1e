// Enrol a folder of crops and search for another crop, from the .proto files alone: no Python, no generated code.
//
//   node search.mjs --server 127.0.0.1:50051 --collection lobby --camera door --crops crops/ --query somebody.jpg
//
// Prints one JSON object a line: health, server, one for each enrolment, the answer. RESIGHT_TOKEN holds a token and
// RESIGHT_TLS_CA the path of a PEM file, where the server asks for them.

import { readFile, readdir } from "node:fs/promises";
import { randomUUID } from "node:crypto";
import { dirname, extname, join, parse } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import health from "grpc-health-check";

const HERE = dirname(fileURLToPath(import.meta.url));
const PROTO = process.env.RESIGHT_PROTO ?? join(HERE, "../../proto"); // the folder with resight/v1/ and google/rpc/
const IMAGES = new Set([".jpg", ".jpeg", ".png", ".webp"]);
const DEADLINE_MS = 10_000;
const DAY_S = 86_400;

const { values: flags } = parseArgs({
  options: {
    server: { type: "string", default: "127.0.0.1:50051" },
    collection: { type: "string", default: "lobby" },
    camera: { type: "string", default: "" },
    crops: { type: "string" },
    query: { type: "string" },
    exclude: { type: "string", multiple: true, default: [] },
  },
});

const files = ["admin", "gallery", "search"].map((name) => `resight/v1/${name}.proto`);
const api = grpc.loadPackageDefinition(
  loader.loadSync(files, { includeDirs: [PROTO], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true }),
).resight.v1;

async function credentials() {
  const { RESIGHT_TLS_CA: ca } = process.env;
  return ca ? grpc.credentials.createSsl(await readFile(ca)) : grpc.credentials.createInsecure();
}

/** One call as a promise, with a deadline and the token. */
function call(client, method, request) {
  const metadata = new grpc.Metadata();
  if (process.env.RESIGHT_TOKEN) metadata.set("authorization", `Bearer ${process.env.RESIGHT_TOKEN}`);
  return new Promise((resolve, reject) => {
    client[method](request, metadata, { deadline: Date.now() + DEADLINE_MS }, (error, answer) =>
      error ? reject(error) : resolve(answer),
    );
  });
}

const tell = (what) => console.log(JSON.stringify(what));

async function main() {
  const door = await credentials();
  const Health = grpc.makeClientConstructor(health.service, "Health");
  const { status } = await call(new Health(flags.server, door), "Check", { service: "resight.v1.SearchService" });
  tell({ health: status });
  const info = await call(new api.AdminService(flags.server, door), "GetServerInfo", {});
  tell({ server: info.server_version });

  const gallery = new api.GalleryService(flags.server, door);
  const name = flags.collection;
  try {
    await call(gallery, "CreateCollection", { collection: { collection_id: name, default_ttl: { seconds: DAY_S } } });
  } catch (error) {
    if (error.code !== grpc.status.ALREADY_EXISTS) throw error;
  }
  let revision = 0;
  for (const file of flags.crops ? (await readdir(flags.crops)).sort() : []) {
    if (!IMAGES.has(extname(file).toLowerCase())) continue;
    const answer = await call(gallery, "EnrollEntry", {
      collection_id: name,
      entry: { entry_id: parse(file).name, camera_id: flags.camera },
      image: { data: await readFile(join(flags.crops, file)) },
      request_id: randomUUID(), // sent twice, it is stored once
      on_duplicate: "DUPLICATE_POLICY_REPLACE",
    });
    revision = answer.revision;
    tell({ enrolled: answer.entry.entry_id, revision });
  }
  if (!flags.query) return;
  const found = await call(new api.SearchService(flags.server, door), "Search", {
    collection_id: name,
    image: { data: await readFile(flags.query) },
    top_k: 3,
    filter: { exclude_camera_ids: flags.exclude },
    min_revision: revision, // what was enrolled above is searched
  });
  const hits = found.hits.map((hit) => ({ entry: hit.entry.entry_id, camera: hit.entry.camera_id, ...hit.score }));
  tell({ hits, decision: found.decision, exact: found.exact });
}

main().then(
  () => process.exit(0), // channels would hold the process
  (error) => {
    console.error(`${grpc.status[error.code] ?? "ERROR"}: ${error.details ?? error.message}`);
    process.exit(1);
  },
);
