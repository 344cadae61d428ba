"""The S3-Rec model: encoder, objectives, and the public class."""

from s3rec_dist.model.s3rec import S3Rec as S3Rec
